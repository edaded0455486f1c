//! From turns of a conversation to the prompt that the model was trained on.

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::config::Profile;
use crate::text::{self, ChatTemplate, Conversation, Message, Prompt};

use super::Engine;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Whether the model said it, and not the user.
    pub is_answer: bool,
    /// What was said. Whatever it holds is text: nothing in it becomes a special token or an image.
    pub text: String,
    /// How many images come with it.
    pub n_images: usize,
}

impl Turn {
    /// A question with `n_images` images.
    pub fn user(text: impl Into<String>, n_images: usize) -> Self {
        Self { is_answer: false, text: text.into(), n_images }
    }

    /// What the model answered.
    pub fn assistant(text: impl Into<String>) -> Self {
        Self { is_answer: true, text: text.into(), n_images: 0 }
    }
}

/// Where prompts come from.
pub(super) enum Template {
    /// One of LLaVA's own conversation templates.
    Named(&'static text::Template),
    /// The checkpoint's Jinja template.
    Jinja(Box<ChatTemplate>),
}

impl Template {
    /// The template named, else the checkpoint's own, else what its name hints at.
    pub(super) fn choose(name: Option<&str>, folder: &Path, checkpoint: &Checkpoint, profile: Profile) -> Result<Self> {
        if let Some(name) = name {
            return Ok(Self::Named(text::Template::by_name(name)?));
        }
        let jinja = match (&checkpoint.gguf, &checkpoint.chat_template) {
            (Some(gguf), Some(source)) => Some(ChatTemplate::parse(&gguf.path.display().to_string(), source)?),
            (Some(_), None) => None,
            (None, _) => ChatTemplate::open(&checkpoint.tokenizer_dir)?,
        };
        match (profile, jinja) {
            // Names of such files tell of their numbers rather than of their model, and none is of a model from before LLaVA-1.5.
            (Profile::Original, None) if checkpoint.gguf.is_some() => Ok(Self::Named(text::Template::by_name("vicuna_v1")?)),
            (Profile::Hf, Some(jinja)) => Ok(Self::Jinja(Box::new(jinja))),
            (Profile::Hf, None) => Ok(Self::Named(text::Template::by_name("hf")?)),
            (Profile::Original, jinja) => {
                let hint = jinja.as_ref().map(|j| j.source());
                // Of a checkpoint that was made from another one, that one's name tells.
                let name = checkpoint.quantized_from.as_ref().map_or_else(|| folder.to_string_lossy(), |name| name.into());
                Ok(Self::Named(text::pick_by_hints(&name, hint)))
            }
        }
    }
}

impl Engine {
    /// The prompt for a conversation whose last turn is the user's; `system` stands instead of the template's own system prompt.
    ///
    /// # Errors
    /// If the checkpoint's own template refuses the conversation.
    pub fn prompt(&self, system: Option<&str>, turns: &[Turn]) -> Result<Prompt> {
        if turns.last().is_none_or(|t| t.is_answer) {
            return Err(Error::usage("a conversation must end with a question"));
        }
        self.render(system, turns)
    }

    /// The turns in the dress of the template, and after a question the beginning of an answer.
    pub(super) fn render(&self, system: Option<&str>, turns: &[Turn]) -> Result<Prompt> {
        match &self.template {
            Template::Named(template) => {
                let mut conversation = Conversation::new(template);
                if let Some(system) = system {
                    conversation = conversation.with_system(system);
                }
                for turn in turns {
                    if turn.is_answer {
                        conversation.add_assistant(&turn.text);
                    } else {
                        conversation.add_user(&turn.text, turn.n_images);
                    }
                }
                Ok(conversation.prompt())
            }
            Template::Jinja(template) => {
                let system = system.map(|text| Message::new("system", 0, text));
                let role = |turn: &Turn| if turn.is_answer { "assistant" } else { "user" };
                let messages = turns.iter().map(|t| Message::new(role(t), t.n_images, &t.text));
                let asks = turns.last().is_some_and(|turn| !turn.is_answer);
                template.render(&system.into_iter().chain(messages).collect::<Vec<_>>(), &self.tokenizer, asks)
            }
        }
    }

    /// Texts at which the template in use says that an answer ends, besides the end token.
    pub fn stop_texts(&self) -> Vec<String> {
        match &self.template {
            Template::Named(template) => template.stop_strings(),
            Template::Jinja(_) => Vec::new(),
        }
    }

    /// Name of the template in use.
    pub fn template_name(&self) -> &str {
        match &self.template {
            Template::Named(template) => template.name(),
            Template::Jinja(_) => "the checkpoint's chat template",
        }
    }
}
