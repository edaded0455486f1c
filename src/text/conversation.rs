//! The conversation templates of the original LLaVA (`llava/conversation.py`) and llava-hf's default, as data.

mod jinja;
mod supervised;

use std::ops::Range;

pub use supervised::Supervised;

use super::added::AddedTokens;
use super::prompt::{Prompt, marks};
use crate::error::{Error, Result};

/// How turns are put together (`SeparatorStyle`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `Role: text` and one separator after everything.
    Single,
    /// `Role: text`, one separator after the system prompt and the user, another after the assistant.
    Two,
    /// ChatML: the role, which has its own line break, the text, the separator.
    Mpt,
    /// No roles.
    Plain,
    /// `[INST] text [/INST] answer </s>`, the system prompt inside the first user turn.
    Llama2,
}

/// A conversation template: what stands around the turns. All of them are [`Template::names`].
#[derive(Debug, PartialEq, Eq)]
pub struct Template {
    /// The name first, then its aliases.
    names: &'static [&'static str],
    layout: Layout,
    /// What opens the system prompt, and is no part of its words.
    system_role: &'static str,
    /// `None`: without one unless the user gives one.
    system: Option<&'static str>,
    user: &'static str,
    assistant: &'static str,
    sep: &'static str,
    sep2: &'static str,
    /// A first exchange that is always there.
    seed: Option<(&'static str, &'static str)>,
    /// Whether images come in a first exchange of their own, within `<Image>…</Image>`.
    image_tags: bool,
}

const SYSTEM_A: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
    detailed, and polite answers to the user's questions.";
const SYSTEM_B: &str = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, \
    detailed, and polite answers to the human's questions.";
/// The missing space before "The visual" is the original's.
const SYSTEM_MMTAG: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant is able to \
    understand the visual content that the user provides, and assist the user with a variety of tasks using natural language.The \
    visual content will be provided with the following format: <Image>visual content</Image>.";
/// The two spaces before "Your answers" are the original's.
const SYSTEM_LLAMA_2: &str = "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while \
    being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. \
    Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is \
    not factually coherent, explain why instead of answering something not correct. If you don't know the answer to a question, \
    please don't share false information.";
const SYSTEM_LLAVA_LLAMA_2: &str = "You are a helpful language and vision assistant. You are able to understand the visual content \
    that the user provides, and assist the user with a variety of tasks using natural language.";
const SYSTEM_MPT: &str =
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.";

const SEED_QUESTION: &str = "What are the key differences between renewable and non-renewable energy sources?";
const SEED_ANSWER: &str = "Renewable energy sources are those that can be replenished naturally in a relatively short amount of \
    time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and will \
    eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable and non-renewable \
    energy sources:\n\
    1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are finite and will \
    eventually run out.\n\
    2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable sources, which can \
    lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n\
    3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower operational costs \
    than non-renewable sources.\n\
    4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than non-renewable \
    sources.\n\
    5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and needs, while \
    non-renewable sources are more rigid and inflexible.\n\
    6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources are not, and \
    their depletion can lead to economic and social instability.\n";

/// What the templates below have in common with v1.
const VICUNA_V1: Template = Template {
    names: &["vicuna_v1", "v1"],
    layout: Layout::Two,
    system_role: "",
    system: Some(SYSTEM_A),
    user: "USER",
    assistant: "ASSISTANT",
    sep: " ",
    sep2: "</s>",
    seed: None,
    image_tags: false,
};

const LLAVA_V0: Template = Template {
    names: &["llava_v0"],
    layout: Layout::Single,
    system: Some(SYSTEM_B),
    user: "Human",
    assistant: "Assistant",
    sep: "###",
    sep2: "",
    ..VICUNA_V1
};

const LLAVA_LLAMA_2: Template =
    Template { names: &["llava_llama_2"], layout: Layout::Llama2, system: Some(SYSTEM_LLAVA_LLAMA_2), sep: "<s>", ..VICUNA_V1 };

const MPT: Template = Template {
    names: &["mpt"],
    layout: Layout::Mpt,
    system_role: "<|im_start|>system\n",
    system: Some(SYSTEM_MPT),
    user: "<|im_start|>user\n",
    assistant: "<|im_start|>assistant\n",
    sep: "<|im_end|>",
    sep2: "",
    ..VICUNA_V1
};

static TEMPLATES: &[Template] = &[
    VICUNA_V1,
    Template { names: &["llava_v1"], system: Some(SYSTEM_B), ..VICUNA_V1 },
    Template { names: &["v1_mmtag"], system: Some(SYSTEM_MMTAG), image_tags: true, ..VICUNA_V1 },
    // As transformers documents llava-1.5-hf: no system prompt.
    Template { names: &["hf", "llava_hf"], system: None, ..VICUNA_V1 },
    LLAVA_V0,
    Template { names: &["v0", "default"], seed: Some((SEED_QUESTION, SEED_ANSWER)), ..LLAVA_V0 },
    Template { names: &["v0_mmtag"], system: Some(SYSTEM_MMTAG), image_tags: true, ..LLAVA_V0 },
    LLAVA_LLAMA_2,
    Template { names: &["llama_2"], system: Some(SYSTEM_LLAMA_2), ..LLAVA_LLAMA_2 },
    Template { names: &["mistral_instruct"], system: Some(""), sep: "", ..LLAVA_LLAMA_2 },
    MPT,
    Template { names: &["chatml_direct", "mistral_direct"], system: Some("Answer the questions."), ..MPT },
    Template {
        names: &["plain", "v0_plain"],
        layout: Layout::Plain,
        system: Some(""),
        user: "",
        assistant: "",
        sep: "\n",
        sep2: "",
        ..VICUNA_V1
    },
];

impl Template {
    /// The template of that name or alias.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names there are.
    pub fn by_name(name: &str) -> Result<&'static Template> {
        let known = || Template::names().collect::<Vec<_>>().join(", ");
        let found = TEMPLATES.iter().find(|t| t.names.contains(&name));
        found.ok_or_else(|| Error::usage(format!("no conversation template `{name}`; there are: {}", known())))
    }

    /// All names and aliases.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TEMPLATES.iter().flat_map(|t| t.names.iter().copied())
    }

    /// The name.
    pub fn name(&self) -> &'static str {
        self.names[0]
    }

    /// The strings at which an answer ends, besides the end token of the checkpoint.
    pub fn stop_strings(&self) -> Vec<String> {
        let stop = if matches!(self.layout, Layout::Single | Layout::Mpt) { self.sep } else { self.sep2 };
        Some(stop).filter(|s| !s.is_empty()).map(str::to_owned).into_iter().collect()
    }
}

/// The template that a checkpoint was probably trained with, where its files do not say: by the special tokens of its
/// `chat_template` if it has one, else by its name, as LLaVA's own command line does.
pub fn pick_by_hints(model_name_or_path: &str, chat_template: Option<&str>) -> &'static Template {
    let says = |mark: &str| chat_template.is_some_and(|t| t.contains(mark));
    // A checkpoint folder of a run is named by what it lies in.
    let mut folders = model_name_or_path.trim_end_matches('/').rsplit('/');
    let last = folders.next().unwrap_or_default();
    let name = if last.starts_with("checkpoint-") { folders.next().unwrap_or(last) } else { last }.to_lowercase();
    let found = if says("<|im_start|>") {
        "chatml_direct"
    } else if says("<<SYS>>") || name.contains("llama-2") {
        "llava_llama_2"
    } else if says("[INST]") || name.contains("mistral") {
        "mistral_instruct"
    } else if name.contains("v1.6-34b") {
        "chatml_direct"
    } else if name.contains("v1") {
        "llava_v1"
    } else if name.contains("mpt") {
        "mpt"
    } else {
        "llava_v0"
    };
    TEMPLATES.iter().find(|t| t.names.contains(&found)).unwrap_or(&TEMPLATES[0])
}

/// One turn; the speaker is told by its place.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Turn {
    User { text: String, n_images: usize },
    Assistant { text: String },
}

/// A conversation in the dress of a template. What users and the model said is text: nothing in it is ever a special token or an
/// image.
#[derive(Clone, Debug)]
pub struct Conversation {
    template: &'static Template,
    system: Option<String>,
    turns: Vec<Turn>,
}

impl Conversation {
    /// A conversation without turns.
    pub fn new(template: &'static Template) -> Self {
        Self { template, system: template.system.map(str::to_owned), turns: Vec::new() }
    }

    /// With these words as the system prompt instead of the template's.
    pub fn with_system(mut self, words: &str) -> Self {
        self.system = Some(words.to_owned());
        self
    }

    /// The template.
    pub fn template(&self) -> &'static Template {
        self.template
    }

    /// Adds what the user says, with `n_images` images in front of it.
    pub fn add_user(&mut self, text: &str, n_images: usize) -> &mut Self {
        self.turns.push(Turn::User { text: text.to_owned(), n_images });
        self
    }

    /// Adds what the model answered.
    pub fn add_assistant(&mut self, text: &str) -> &mut Self {
        self.turns.push(Turn::Assistant { text: text.to_owned() });
        self
    }

    /// How many images the turns have.
    pub fn n_images(&self) -> usize {
        let images = self.turns.iter().map(|t| if let Turn::User { n_images, .. } = t { *n_images } else { 0 });
        images.sum()
    }

    /// The prompt: all turns, and after a user's the beginning of an answer.
    pub fn prompt(&self) -> Prompt {
        let mut writer = Writer::new(self.template);
        writer.system(self.system.as_deref());
        let turns = self.turns_with_image_exchange();
        for turn in &turns {
            writer.turn(turn, self.system.as_deref());
        }
        if matches!(turns.last(), Some(Turn::User { .. })) {
            writer.turn(&Turn::Assistant { text: String::new() }, None);
        }
        writer.prompt
    }

    /// The turns with those that the template itself adds: its seed, and the exchange that shows the images of the first turn.
    fn turns_with_image_exchange(&self) -> Vec<Turn> {
        let said = |user: &str, assistant: &str| {
            [Turn::User { text: user.to_owned(), n_images: 0 }, Turn::Assistant { text: assistant.to_owned() }]
        };
        let mut turns: Vec<Turn> = self.template.seed.map(|(q, a)| said(q, a)).into_iter().flatten().collect();
        let mut own = self.turns.clone();
        if let Some(Turn::User { n_images, .. }) = own.first_mut().filter(|_| self.template.image_tags)
            && *n_images > 0
        {
            turns.push(Turn::User { text: String::new(), n_images: std::mem::take(n_images) });
            turns.push(Turn::Assistant { text: "Received.".to_owned() });
        }
        turns.extend(own);
        turns
    }
}

/// The special tokens that the templates above write.
const SPECIALS: [&str; 4] = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];

/// Puts turns in the dress of a template.
struct Writer {
    template: &'static Template,
    prompt: Prompt,
    marks: AddedTokens,
    first_turn: bool,
    /// Whether an image without words beside it goes without the line break behind it, as in training.
    bare_images: bool,
    /// What the model is to learn, in bytes of the prompt's text: answers, and what the template ends them with.
    answers: Vec<Range<usize>>,
}

impl Writer {
    fn new(template: &'static Template) -> Self {
        let (prompt, marks) = (Prompt::new(), marks(SPECIALS));
        Self { template, prompt, marks, first_turn: true, bare_images: false, answers: Vec::new() }
    }

    /// The system prompt, where it stands in front of the turns.
    fn system(&mut self, words: Option<&str>) {
        let Some(words) = words.filter(|_| self.template.layout != Layout::Llama2) else { return };
        self.words(self.template.system_role);
        self.prompt.text(words);
        if self.template.layout != Layout::Plain {
            self.words(self.template.sep);
        }
    }

    fn turn(&mut self, turn: &Turn, system: Option<&str>) {
        let template = self.template;
        let (role, sep, empty) = match turn {
            Turn::User { text, n_images } => (template.user, template.sep, text.is_empty() && *n_images == 0),
            Turn::Assistant { text } => (template.assistant, template.sep2, text.is_empty()),
        };
        let mut start = self.prompt.n_bytes();
        match template.layout {
            // As in the original, a turn without words is the beginning of one.
            Layout::Single | Layout::Two if empty => self.words(&format!("{role}:")),
            Layout::Mpt if empty => self.words(role),
            Layout::Llama2 | Layout::Plain if empty => {}
            Layout::Single => {
                self.words(&format!("{role}: "));
                self.say(turn);
                self.words(template.sep);
            }
            Layout::Two => {
                self.words(&format!("{role}:"));
                // The space belongs to the answer: SentencePiece puts it into the answer's first piece.
                start = self.prompt.n_bytes();
                self.words(" ");
                self.say(turn);
                self.words(sep);
            }
            Layout::Mpt => {
                self.words(role);
                start = self.prompt.n_bytes();
                self.say(turn);
                self.words(template.sep);
            }
            Layout::Plain => {
                self.say(turn);
                self.words(template.sep);
            }
            Layout::Llama2 => match turn {
                Turn::User { .. } => {
                    // The original strips `<s>` from the front of the prompt, since BOS comes with the ids.
                    if self.prompt.parts().is_some_and(|parts| !parts.is_empty()) {
                        self.words(template.sep);
                    }
                    self.words("[INST] ");
                    if let Some(words) = system.filter(|w| self.first_turn && !w.is_empty()) {
                        self.words("<<SYS>>\n");
                        self.prompt.text(words);
                        self.words("\n<</SYS>>\n\n");
                    }
                    self.say(turn);
                    self.words(" [/INST]");
                }
                Turn::Assistant { .. } => {
                    self.words(" ");
                    self.say(turn);
                    self.words(" ");
                    self.words(template.sep2);
                }
            },
        }
        if !empty && matches!(turn, Turn::Assistant { .. }) {
            self.answers.push(start..self.prompt.n_bytes());
        }
        self.first_turn = false;
    }

    /// What was said: the images, then the text as it is.
    fn say(&mut self, turn: &Turn) {
        match turn {
            Turn::User { text, n_images } => {
                for i in 0..*n_images {
                    let tags = self.template.image_tags;
                    let bare = text.is_empty() && (tags || (self.bare_images && i + 1 == *n_images));
                    self.words(if tags { "<Image><image></Image>" } else { "<image>" });
                    self.words(if bare { "" } else { "\n" });
                }
                self.prompt.text(text);
            }
            Turn::Assistant { text } => self.prompt.text(text),
        }
    }

    /// Words of the template, special tokens and image marks included.
    fn words(&mut self, words: &str) {
        self.prompt.template(words, &self.marks);
    }
}
