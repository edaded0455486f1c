//! Text to ids, in the manner of each reference.

use tokenizers::models::bpe::BPE;
use tokenizers::normalizer::Range as Slice;
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
    Token,
};

use super::added::{AddedTokens, IMAGE_ID, IMAGE_MARK, Pass, Reading, Span};
use super::decode::{Spelling, Spellings};
use super::prompt::{Content, Prompt, PromptPart};
use super::stream::StreamDecoder;
use crate::error::{Error, Result};

/// A piece of a tokenized prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Ids of text.
    Tokens(Vec<u32>),
    /// Where the features of one image go.
    Image,
}

/// An id and where it begins in its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedId {
    /// The token; `None` where the features of one image go.
    pub id: Option<u32>,
    /// The byte of the prompt's text (what its `Display` prints) at which it begins; 0 for a BOS that the text does not have.
    pub start: usize,
}

/// Ids with the byte at which each begins.
type Starts = Vec<(u32, usize)>;

/// Whose manner of tokenizing a prompt is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// llava-hf: the whole string at once by the fast tokenizer, `<image>` being one of its added tokens.
    Hf,
    /// haotian-liu/LLaVA's `tokenizer_image_token`: each stretch between images by the slow tokenizer, as a text of its own.
    Original,
}

/// A tokenizer of a checkpoint: `tokenizer.json`, or a bare SentencePiece `tokenizer.model`.
///
/// Opened by [`Tokenizer::open`]; shared freely between threads.
pub struct Tokenizer {
    pub(super) model: BPE,
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(super) added: AddedTokens,
    pub(super) spellings: Spellings,
    pub(super) special_ids: SpecialIds,
    pub(super) slow: SlowRules,
    pub(super) n_ids: usize,
}

/// The special tokens with a role.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SpecialIds {
    pub(super) add_bos: bool,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) pad: Option<u32>,
}

/// What the slow `LlamaTokenizer` of transformers does with the space in front of a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlowRules {
    /// `legacy` of `tokenizer_config.json`: SentencePiece's dummy prefix comes after every special token, not only first.
    pub(super) legacy: bool,
    /// SentencePiece's `add_dummy_prefix`; the non-legacy tokenizer puts its own prefix whatever this says.
    pub(super) dummy_prefix: bool,
}

impl Tokenizer {
    /// Ids of a text, without BOS, as the fast tokenizer of transformers gives them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the vocabulary can spell a special token out of ordinary characters, or lacks its unknown token.
    pub fn encode(&self, text: &str, reading: Reading) -> Result<Vec<u32>> {
        let mut spans = self.added.split(text, reading, Pass::Verbatim);
        self.added.swallow_spaces(text, &mut spans, Pass::Verbatim);
        Ok(self.encode_spans(text, &spans, reading)?.into_iter().map(|(id, _)| id).collect())
    }

    /// Ids of a prompt with the places of its images: BOS first where the checkpoint wants it, never twice.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn tokenize_prompt(&self, prompt: &Prompt, style: Style) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        for placed in self.place_prompt(prompt, style)? {
            match (placed.id, pieces.last_mut()) {
                (None, _) => pieces.push(Piece::Image),
                (Some(id), Some(Piece::Tokens(ids))) => ids.push(id),
                (Some(id), _) => pieces.push(Piece::Tokens(vec![id])),
            }
        }
        Ok(pieces)
    }

    /// As [`tokenize_prompt`](Self::tokenize_prompt), with where in the text each id begins.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn place_prompt(&self, prompt: &Prompt, style: Style) -> Result<Vec<PlacedId>> {
        let (text, spans, reading) = self.spans(prompt, style);
        let ids = match style {
            Style::Hf => {
                let ids = self.encode_spans(&text, &spans, reading)?;
                // A template may write BOS itself; a raw prompt is taken as the references take it, BOS on top.
                let written = reading == Reading::Plain && ids.first().map(|(id, _)| *id) == self.special_ids.bos;
                self.leading_bos().filter(|_| !written).map(|id| (id, 0)).into_iter().chain(ids).collect()
            }
            Style::Original => self.encode_around_images(&text, &spans, reading)?,
        };
        Ok(ids.into_iter().map(|(id, start)| PlacedId { id: Some(id).filter(|&id| id != IMAGE_ID), start }).collect())
    }

    /// The text of ids: special tokens left out, the space that encoding puts in front taken away, bytes that are no UTF-8 replaced.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = StreamDecoder::new(self);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// The id of a token by its text, pieces and added tokens alike.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.added.get(token).map(|t| t.id).or_else(|| self.model.token_to_id(token))
    }

    /// The text of a token as the vocabulary spells it (`▁the`, `<0x0A>`, `</s>`); `None` outside the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.added.iter().find(|t| t.id == id).map(|t| t.content.clone()).or_else(|| self.model.id_to_token(id))
    }

    /// Texts of the tokens that steer the model: what a template may write and a user may not.
    pub fn control_tokens(&self) -> impl Iterator<Item = &str> {
        self.added.iter().filter(|t| t.is_control()).map(|t| t.content.as_str())
    }

    /// Whether an id is a special token, which decoding leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.is_special_id(id)
    }

    /// One more than the largest id.
    pub fn n_ids(&self) -> usize {
        self.n_ids
    }

    /// Id of the token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special_ids.bos
    }

    /// Id of the token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special_ids.eos
    }

    /// Id of the token for characters that the vocabulary lacks.
    pub fn unk(&self) -> Option<u32> {
        self.special_ids.unk
    }

    /// Id of the token that fills up short rows.
    pub fn pad(&self) -> Option<u32> {
        self.special_ids.pad
    }

    /// Id of `<image>`, in vocabularies that have it.
    pub fn image(&self) -> Option<u32> {
        self.added.get(IMAGE_MARK).map(|t| t.id).filter(|&id| id != IMAGE_ID)
    }

    pub(super) fn spellings(&self) -> &Spellings {
        &self.spellings
    }

    fn leading_bos(&self) -> Option<u32> {
        self.special_ids.bos.filter(|_| self.special_ids.add_bos)
    }

    /// The whole text of a prompt and its cuts; images have the id [`IMAGE_ID`].
    fn spans(&self, prompt: &Prompt, style: Style) -> (String, Vec<Span>, Reading) {
        let pass = if style == Style::Original { Pass::Both } else { Pass::Verbatim };
        let (text, mut spans, reading) = match prompt.content() {
            Content::Raw(text) => {
                let mut spans = Vec::new();
                let mut start = 0;
                // `<image>` marks an image even in vocabularies that lack it, and whatever flags it has in those that do not.
                for (at, mark) in text.match_indices(IMAGE_MARK) {
                    push_split(&mut spans, start, self.added.split(&text[start..at], Reading::Special, pass));
                    start = at + mark.len();
                    spans.push(Span { range: at..start, id: Some(IMAGE_ID) });
                }
                push_split(&mut spans, start, self.added.split(&text[start..], Reading::Special, pass));
                (text.clone(), spans, Reading::Special)
            }
            Content::Parts(parts) => {
                let (mut text, mut spans) = (String::new(), Vec::new());
                for part in merge_unknown(parts, |token| self.added.get(token).is_some()) {
                    let start = text.len();
                    match &part {
                        PromptPart::Text(words) => {
                            text.push_str(words);
                            push_split(&mut spans, start, self.added.split(words, Reading::Plain, pass));
                        }
                        PromptPart::Special(token) => {
                            text.push_str(token);
                            spans.push(Span { range: start..text.len(), id: self.added.get(token).map(|t| t.id) });
                        }
                        PromptPart::Image => {
                            text.push_str(IMAGE_MARK);
                            spans.push(Span { range: start..text.len(), id: Some(IMAGE_ID) });
                        }
                    }
                }
                (text, spans, Reading::Plain)
            }
        };
        self.added.swallow_spaces(&text, &mut spans, pass);
        (text, spans, reading)
    }

    /// The fast tokenizer's pipeline over a text already cut at its added tokens: normalise, cut at the tokens that are looked for
    /// after that, pre-tokenize, BPE.
    fn encode_spans(&self, text: &str, spans: &[Span], reading: Reading) -> Result<Starts> {
        let mut split = PreTokenizedString::from(text);
        self.run(|| {
            // Cut in place rather than span by span, because pre-tokenizers treat the start of the whole text specially.
            split.split(|_, whole| {
                let slice = |span: &Span| {
                    let slice = whole.slice(Slice::Normalized(span.range.clone())).ok_or("a cut inside a character")?;
                    Ok((slice, span.id.map(added_token)))
                };
                spans.iter().map(slice).collect::<tokenizers::Result<Vec<_>>>()
            })?;
            if let Some(normalizer) = &self.normalizer {
                split.normalize(|s| normalizer.normalize(s))?;
            }
            if self.added.any_normalized(reading) {
                split.split(|_, s| {
                    let spans = self.added.split(s.get(), reading, Pass::Normalized);
                    let slice = |span: Span| {
                        let slice = s.slice(Slice::Normalized(span.range)).ok_or("a cut inside a character")?;
                        Ok((slice, span.id.map(added_token)))
                    };
                    spans.into_iter().map(slice).collect::<tokenizers::Result<Vec<_>>>()
                })?;
            }
            if let Some(pre_tokenizer) = &self.pre_tokenizer {
                pre_tokenizer.pre_tokenize(&mut split)?;
            }
            split.tokenize(|s: &NormalizedString| self.pieces(s.get(), reading))
        })?;
        let encoding = self.run(|| split.into_encoding(None, 0, OffsetType::Byte))?;
        Ok(encoding.get_ids().iter().copied().zip(encoding.get_offsets().iter().map(|(start, _)| *start)).collect())
    }

    /// LLaVA's `tokenizer_image_token`: every stretch between images is a text of its own, with BOS; only the first BOS stays.
    fn encode_around_images(&self, text: &str, spans: &[Span], reading: Reading) -> Result<Starts> {
        let mut ids = Starts::new();
        let mut images = spans.iter().filter(|s| s.id == Some(IMAGE_ID));
        for (i, stretch) in spans.split(|s| s.id == Some(IMAGE_ID)).enumerate() {
            let stretch_ids = self.encode_slow(text, stretch, reading)?;
            if i > 0 {
                ids.extend(images.next().map(|s| (IMAGE_ID, s.range.start)));
            } else if !(reading == Reading::Plain && stretch_ids.first().map(|(id, _)| *id) == self.special_ids.bos) {
                ids.extend(self.leading_bos().map(|id| (id, 0)));
            }
            ids.extend(stretch_ids);
        }
        Ok(ids)
    }

    /// The slow `LlamaTokenizer` of transformers 4.37 over one text, cut at its special tokens; without BOS.
    fn encode_slow(&self, text: &str, spans: &[Span], reading: Reading) -> Result<Starts> {
        if self.spellings.spelling == Spelling::ByteLevel {
            // Such vocabularies exist only in the fast form.
            let Some((first, last)) = spans.first().zip(spans.last()) else { return Ok(Starts::new()) };
            let start = first.range.start;
            let shifted = |s: &Span| Span { range: s.range.start - start..s.range.end - start, id: s.id };
            let spans: Vec<Span> = spans.iter().map(shifted).collect();
            let mut ids = self.encode_spans(&text[start..last.range.end], &spans, reading)?;
            ids.iter_mut().for_each(|(_, at)| *at += start);
            return Ok(ids);
        }
        let mut ids = Starts::new();
        for (i, span) in spans.iter().enumerate() {
            let start = span.range.start;
            let Some(id) = span.id else {
                let prefix = if self.slow.legacy { self.slow.dummy_prefix } else { i == 0 };
                let (prefix, words) = (if prefix { SPACE } else { "" }, &text[span.range.clone()]);
                let tokens = self.run(|| self.pieces(&(prefix.to_owned() + &words.replace(' ', SPACE)), reading))?;
                let starts = starts_before_escape(words, prefix.len(), &tokens);
                ids.extend(tokens.iter().zip(starts).map(|(token, at)| (token.id, start + at)));
                continue;
            };
            ids.push((id, start));
        }
        Ok(ids)
    }

    /// BPE over one stretch of text. Merges that spell a control token out of plain text would let a user forge it: refused.
    fn pieces(&self, text: &str, reading: Reading) -> tokenizers::Result<Vec<Token>> {
        let tokens = self.model.tokenize(text)?;
        let forged = |t: &&Token| Some(t.id) != self.special_ids.unk && self.added.is_control_id(t.id);
        match tokens.iter().find(forged).filter(|_| reading == Reading::Plain) {
            Some(token) => Err(format!("its merges make the special token `{}` out of plain text", token.value).into()),
            None => Ok(tokens),
        }
    }

    /// Runs a step of the `tokenizers` crate, whose errors carry neither type nor place.
    fn run<T>(&self, step: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        step().map_err(|e| Error::Unsupported(format!("the tokenizer cannot encode this text: {e}")))
    }
}

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";

/// Where in `words` each token begins, of the tokens of a prefix and `words` with its spaces written as [`SPACE`]. One that begins within
/// the prefix or within a character begins with it.
fn starts_before_escape(words: &str, prefix_bytes: usize, tokens: &[Token]) -> Vec<usize> {
    let mut chars = words.char_indices().peekable();
    let mut end = prefix_bytes; // of the characters that were passed, escaped
    let start = |token: &Token| {
        while let Some(&(at, c)) = chars.peek() {
            let width = if c == ' ' { SPACE.len() } else { c.len_utf8() };
            if end + width > token.offsets.0 {
                return at;
            }
            end += width;
            chars.next();
        }
        words.len()
    };
    tokens.iter().map(start).collect()
}

/// Special tokens that the vocabulary does not know are text, and melt with the text beside them.
fn merge_unknown(parts: &[PromptPart], known: impl Fn(&str) -> bool) -> Vec<PromptPart> {
    let mut merged: Vec<PromptPart> = Vec::with_capacity(parts.len());
    for part in parts {
        let words = match part {
            PromptPart::Text(words) => words,
            PromptPart::Special(token) if !known(token) => token,
            other => {
                merged.push(other.clone());
                continue;
            }
        };
        match merged.last_mut() {
            Some(PromptPart::Text(last)) => last.push_str(words),
            _ => merged.push(PromptPart::Text(words.clone())),
        }
    }
    merged
}

/// Appends the spans of a stretch that begins at `start` of the whole text.
fn push_split(spans: &mut Vec<Span>, start: usize, stretch: Vec<Span>) {
    spans.extend(stretch.into_iter().map(|s| Span { range: s.range.start + start..s.range.end + start, id: s.id }));
}

fn added_token(id: u32) -> Vec<Token> {
    vec![Token::new(id, String::new(), (0, 0))]
}
