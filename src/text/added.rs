//! Tokens added on top of a vocabulary: `</s>`, `<image>`, `<|im_end|>`. They are matched in a text before it is cut into pieces.
//!
//! Matching is our own, not the `tokenizers` crate's, because who wrote a stretch of text decides what may match in it: a
//! template's `</s>` is a token, the same four characters typed by a user are not, whatever flags the checkpoint gives them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// The mark for a picture, in prompts and in the vocabularies that know it.
pub const IMAGE_MARK: &str = "<image>";

/// Stands for an image among ids until the prompt is cut there; no vocabulary reaches it (see `open::MAX_IDS`).
pub const IMAGE_ID: u32 = u32::MAX;

/// One added token and how it is matched, as `tokenizer.json` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// The text that it stands for.
    pub content: String,
    /// Whether it swallows white space on its left.
    pub lstrip: bool,
    /// Whether it swallows white space on its right.
    pub rstrip: bool,
    /// Whether it matches only between non-word characters.
    pub single_word: bool,
    /// Whether it is looked for in the normalised text instead of the text as given.
    pub normalized: bool,
    /// Whether it is left out of decoded text.
    pub special: bool,
}

impl AddedToken {
    /// A special token without quirks, as SentencePiece vocabularies have them.
    pub fn special(id: u32, content: impl Into<String>) -> Self {
        Self { id, content: content.into(), lstrip: false, rstrip: false, single_word: false, normalized: false, special: true }
    }

    /// Whether it steers the model rather than spelling text. Checkpoints forget the `special` flag (llava-hf's `<image>` and
    /// `<pad>` have come without it), so anything in brackets counts; runs of spaces and words do not.
    pub fn is_control(&self) -> bool {
        let c = self.content.as_str();
        self.special || (c.starts_with('<') && c.ends_with('>')) || (c.starts_with('[') && c.ends_with(']'))
    }
}

/// Who wrote a text, and so which added tokens are read in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// A user: only added tokens that spell text match; `</s>` and `<image>` are plain characters.
    Plain,
    /// The caller of a raw prompt, as the references read it: every added token matches.
    Special,
}

/// When in the pipeline tokens are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// In the text as given: the tokens with `normalized: false`.
    Verbatim,
    /// In normalised text: the rest of them.
    Normalized,
    /// All at once, as the Python ("slow") tokenizers do.
    Both,
}

/// A stretch of text; with an id where it is an added token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its bytes.
    pub range: Range<usize>,
    /// The token it is, `None` for text to be cut into pieces.
    pub id: Option<u32>,
}

/// All added tokens of a tokenizer.
#[derive(Clone, Debug, Default)]
pub struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// What each looks like in normalised text.
    patterns: Vec<String>,
    /// Indices by the first byte of the text as given and of the normalised one, longest first.
    verbatim: HashMap<u8, Vec<usize>>,
    normalized: HashMap<u8, Vec<usize>>,
    control_ids: HashSet<u32>,
    special_ids: HashSet<u32>,
}

impl AddedTokens {
    /// Takes the tokens with the function that normalises text; a later token of the same content replaces an earlier one.
    pub fn new(tokens: Vec<AddedToken>, normalize: impl Fn(&str) -> String) -> Self {
        let mut all = Self::default();
        let mut places: HashMap<String, usize> = HashMap::new();
        for token in tokens.into_iter().filter(|t| !t.content.is_empty()) {
            match places.entry(token.content.clone()) {
                Entry::Occupied(place) => all.tokens[*place.get()] = token,
                Entry::Vacant(place) => {
                    place.insert(all.tokens.len());
                    all.tokens.push(token);
                }
            }
        }
        all.control_ids = all.tokens.iter().filter(|t| t.is_control()).map(|t| t.id).collect();
        all.special_ids = all.tokens.iter().filter(|t| t.special).map(|t| t.id).collect();
        all.patterns = all.tokens.iter().map(|t| normalize(&t.content)).collect();
        for (i, token) in all.tokens.iter().enumerate() {
            all.verbatim.entry(token.content.as_bytes()[0]).or_default().push(i);
            if let Some(&first) = all.patterns[i].as_bytes().first() {
                all.normalized.entry(first).or_default().push(i);
            }
        }
        let (tokens, patterns) = (&all.tokens, &all.patterns);
        all.verbatim.values_mut().for_each(|v| v.sort_by_key(|&i| usize::MAX - tokens[i].content.len()));
        all.normalized.values_mut().for_each(|v| v.sort_by_key(|&i| usize::MAX - patterns[i].len()));
        all
    }

    /// The tokens in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = &AddedToken> {
        self.tokens.iter()
    }

    /// The token of that content.
    pub fn get(&self, content: &str) -> Option<&AddedToken> {
        let candidates = self.verbatim.get(content.as_bytes().first()?)?;
        candidates.iter().map(|&i| &self.tokens[i]).find(|t| t.content == content)
    }

    /// Whether an id steers the model, see [`AddedToken::is_control`].
    pub fn is_control_id(&self, id: u32) -> bool {
        self.control_ids.contains(&id)
    }

    /// Whether an id is left out of decoded text.
    pub fn is_special_id(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Whether any token has to be looked for in normalised text.
    pub fn any_normalized(&self, reading: Reading) -> bool {
        self.tokens.iter().any(|t| t.normalized && (reading == Reading::Special || !t.is_control()))
    }

    /// Cuts `text` at the tokens that match in it: leftmost, then longest. The spans cover all of it and none is empty.
    pub fn split(&self, text: &str, reading: Reading, pass: Pass) -> Vec<Span> {
        let index = if pass == Pass::Normalized { &self.normalized } else { &self.verbatim };
        let wanted = |t: &AddedToken| {
            (reading == Reading::Special || !t.is_control())
                && match pass {
                    Pass::Verbatim => !t.normalized,
                    Pass::Normalized => t.normalized,
                    Pass::Both => true,
                }
        };
        let (mut spans, mut text_start, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            let rest = &text.as_bytes()[at..];
            let pattern =
                |i: usize| if pass == Pass::Normalized { self.patterns[i].as_str() } else { self.tokens[i].content.as_str() };
            let hit = index.get(&rest[0]).and_then(|candidates| {
                candidates.iter().copied().find(|&i| wanted(&self.tokens[i]) && rest.starts_with(pattern(i).as_bytes()))
            });
            let Some(i) = hit else {
                at += 1;
                continue;
            };
            let (token, start, end) = (&self.tokens[i], at, at + pattern(i).len());
            at = end;
            if token.single_word && (text[..start].ends_with(is_word) || text[end..].starts_with(is_word)) {
                continue;
            }
            push_text(&mut spans, text_start..start);
            spans.push(Span { range: start..end, id: Some(token.id) });
            text_start = end;
        }
        push_text(&mut spans, text_start..text.len());
        spans
    }

    /// Lets the tokens flagged `lstrip` or `rstrip` swallow the white space beside them. In the pass of the slow tokenizers an image
    /// has no flags: the prompt is cut there before they see it.
    pub fn swallow_spaces(&self, text: &str, spans: &mut Vec<Span>, pass: Pass) {
        let is_image = |t: &AddedToken| t.content == IMAGE_MARK && pass != Pass::Both;
        let flagged = self.tokens.iter().filter(|t| t.lstrip || t.rstrip);
        let flags: HashMap<u32, (bool, bool)> =
            flagged.map(|t| (if is_image(t) { IMAGE_ID } else { t.id }, (t.lstrip, t.rstrip))).collect();
        if flags.is_empty() {
            return;
        }
        for i in 0..spans.len() {
            let Some(&(lstrip, rstrip)) = spans[i].id.as_ref().and_then(|id| flags.get(id)) else { continue };
            if lstrip && i > 0 && spans[i - 1].id.is_none() {
                let left = spans[i - 1].range.clone();
                let cut = left.start + text[left].trim_end().len();
                spans[i - 1].range.end = cut;
                spans[i].range.start = cut;
            }
            if rstrip && i + 1 < spans.len() && spans[i + 1].id.is_none() {
                let right = spans[i + 1].range.clone();
                let cut = right.end - text[right].trim_start().len();
                spans[i].range.end = cut;
                spans[i + 1].range.start = cut;
            }
        }
        spans.retain(|s| !s.range.is_empty());
    }
}

/// Appends a stretch of text unless it is empty.
fn push_text(spans: &mut Vec<Span>, range: Range<usize>) {
    if !range.is_empty() {
        spans.push(Span { range, id: None });
    }
}

/// A character of `\w`.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
