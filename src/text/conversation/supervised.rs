//! Conversations as LLaVA is trained on them: the text, and which parts of it the model is to learn.

use std::ops::Range;

use super::{Conversation, Layout, Turn, Writer};
use crate::error::{Error, Result};
use crate::text::Prompt;

/// A whole conversation and the parts of it that are learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supervised {
    /// The conversation.
    pub prompt: Prompt,
    /// What is learnt, in bytes of the prompt's text, in order: a token is supervised if it begins within one of them.
    pub answers: Vec<Range<usize>>,
}

impl Conversation {
    /// The conversation as `preprocess_*` of the original's `llava/train/train.py` render it, with what they leave unmasked:
    ///
    /// | template | the model learns |
    /// |---|---|
    /// | `v1` and its kin, ChatML | each answer and the separator after it |
    /// | `llama_2`, `mistral_instruct` | the space before each answer, the answer, ` </s>` |
    /// | `plain` | all that follows the image, which stands for the whole question |
    /// | `v0` and its kin | the lines `### Assistant: answer` whole, and each `###` after them |
    ///
    /// This differs from [`prompt`](Conversation::prompt), which is for asking: there is no seed, `<Image>` tags stand within the first
    /// question, an image without words has no line break behind it, and `v0` has line breaks and `### ` in front of its roles.
    ///
    /// # Errors
    /// [`Error::Template`] if the template cannot hold such a conversation: `plain` takes one picture's question and its answer,
    /// `llama_2` has its system prompt within the first question, which must not be empty then.
    pub fn supervised(&self) -> Result<Supervised> {
        let mut writer = Writer { bare_images: true, ..Writer::new(self.template) };
        match self.template.layout {
            Layout::Plain => self.caption(&mut writer)?,
            Layout::Single => self.lines(&mut writer),
            Layout::Llama2 if matches!(self.turns.first(), Some(Turn::User { text, n_images: 0 }) if text.is_empty()) => {
                return Err(Error::template(self.template.name(), "the first question is empty, but has the system prompt in it"));
            }
            Layout::Two | Layout::Mpt | Layout::Llama2 => {
                writer.system(self.system.as_deref());
                self.turns.iter().for_each(|turn| writer.turn(turn, self.system.as_deref()));
            }
        }
        Ok(Supervised { prompt: writer.prompt, answers: writer.answers })
    }

    /// `<image>caption\n`.
    fn caption(&self, writer: &mut Writer) -> Result<()> {
        if self.system.as_deref().is_some_and(|words| !words.is_empty()) {
            return Err(Error::template(self.template.name(), "it has no place for a system prompt"));
        }
        let [Turn::User { n_images: n_images @ 1.., .. }, caption @ Turn::Assistant { .. }] = &self.turns[..] else {
            let problem = "it takes one question with an image and its answer; of anything else it would drop the text";
            return Err(Error::template(self.template.name(), problem));
        };
        (0..*n_images).for_each(|_| writer.words("<image>"));
        let start = writer.prompt.n_bytes();
        writer.say(caption);
        writer.words(self.template.sep);
        writer.answers.push(start..writer.prompt.n_bytes());
        Ok(())
    }

    /// The system prompt and an empty line, `### Human: question\n`, `### Assistant: answer\n`, and `### ` at the end.
    fn lines(&self, writer: &mut Writer) {
        const SIGNAL: &str = "###";
        writer.prompt.text(self.system.as_deref().unwrap_or_default());
        writer.words("\n\n");
        for turn in &self.turns {
            let start = writer.prompt.n_bytes();
            let role = if matches!(turn, Turn::User { .. }) { self.template.user } else { self.template.assistant };
            writer.words(&format!("{SIGNAL} {role}: "));
            writer.say(turn);
            writer.words("\n");
            // Of a question only the mark is learnt, at which answers end.
            let end = if matches!(turn, Turn::User { .. }) { start + SIGNAL.len() } else { writer.prompt.n_bytes() };
            writer.answers.push(start..end);
        }
        let start = writer.prompt.n_bytes();
        writer.words(&format!("{SIGNAL} "));
        writer.answers.push(start..writer.prompt.n_bytes());
    }
}
