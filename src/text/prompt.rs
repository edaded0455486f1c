//! A prompt as parts, so that what a user typed is never mistaken for what a template wrote.

use std::fmt;

use super::added::{AddedToken, AddedTokens, IMAGE_MARK, Pass, Reading};

/// One part of a [`Prompt`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptPart {
    /// Words of a template or of a user. `</s>` or `<image>` in here stays plain text.
    Text(String),
    /// A special token that a template writes, like `</s>` or `<|im_end|>`; plain text to a vocabulary that lacks it.
    Special(String),
    /// Where the features of one image go.
    Image,
}

impl PromptPart {
    /// As the references would see it.
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Special(text) => text,
            Self::Image => IMAGE_MARK,
        }
    }
}

/// A prompt, ready to be tokenized. `Display` prints it the way the references would see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Raw(String),
    Parts(Vec<PromptPart>),
}

impl Prompt {
    /// A prompt taken verbatim and read as the references read a string: special tokens in it are special, every `<image>` is an
    /// image. Nothing is added but BOS.
    pub fn raw(text: &str) -> Self {
        Self { content: Content::Raw(text.to_owned()) }
    }

    /// An empty prompt of parts, to be filled by [`text`](Self::text), [`special`](Self::special) and [`image`](Self::image).
    pub fn new() -> Self {
        Self { content: Content::Parts(Vec::new()) }
    }

    /// Adds plain text; neighbours melt together, since tokens may span them.
    pub fn text(&mut self, text: &str) {
        match &mut self.content {
            Content::Raw(raw) => raw.push_str(text),
            Content::Parts(parts) => match parts.last_mut() {
                Some(PromptPart::Text(last)) => last.push_str(text),
                _ if text.is_empty() => {}
                _ => parts.push(PromptPart::Text(text.to_owned())),
            },
        }
    }

    /// Adds a special token by its text.
    pub fn special(&mut self, token: &str) {
        match &mut self.content {
            Content::Raw(raw) => raw.push_str(token),
            Content::Parts(parts) => parts.push(PromptPart::Special(token.to_owned())),
        }
    }

    /// Adds the place of an image.
    pub fn image(&mut self) {
        match &mut self.content {
            Content::Raw(raw) => raw.push_str(IMAGE_MARK),
            Content::Parts(parts) => parts.push(PromptPart::Image),
        }
    }

    /// Adds words of a template, in which `marks` are special tokens and `<image>` is an image.
    pub(super) fn template(&mut self, words: &str, marks: &AddedTokens) {
        for span in marks.split(words, Reading::Special, Pass::Both) {
            match (&words[span.range], span.id) {
                (IMAGE_MARK, Some(_)) => self.image(),
                (mark, Some(_)) => self.special(mark),
                (text, None) => self.text(text),
            }
        }
    }

    /// How many images the prompt has a place for.
    pub fn n_images(&self) -> usize {
        match &self.content {
            Content::Raw(text) => text.matches(IMAGE_MARK).count(),
            Content::Parts(parts) => parts.iter().filter(|p| **p == PromptPart::Image).count(),
        }
    }

    /// How many bytes its text has, the one that `Display` prints.
    pub(super) fn n_bytes(&self) -> usize {
        match &self.content {
            Content::Raw(text) => text.len(),
            Content::Parts(parts) => parts.iter().map(|part| part.text().len()).sum(),
        }
    }

    /// The parts; `None` for a raw prompt, which has none.
    pub fn parts(&self) -> Option<&[PromptPart]> {
        match &self.content {
            Content::Raw(_) => None,
            Content::Parts(parts) => Some(parts),
        }
    }

    pub(super) fn content(&self) -> &Content {
        &self.content
    }
}

impl Default for Prompt {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.content {
            Content::Raw(text) => f.write_str(text),
            Content::Parts(parts) => parts.iter().try_for_each(|part| f.write_str(part.text())),
        }
    }
}

/// The strings that [`Prompt::template`] looks for: `specials` and `<image>`.
pub(super) fn marks<'a>(specials: impl IntoIterator<Item = &'a str>) -> AddedTokens {
    let all = specials.into_iter().chain([IMAGE_MARK]);
    AddedTokens::new(all.map(|s| AddedToken::special(0, s)).collect(), str::to_owned)
}
