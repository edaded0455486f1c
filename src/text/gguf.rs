//! The tokenizer in the metadata of a GGUF file: the pieces of a SentencePiece model, and what llama.cpp does with them.

use std::path::Path;

use serde_json::{Map, Value};

use super::open::{Companions, from_pieces};
use super::sentencepiece::{MAX_PIECE_BYTES, MAX_PIECES, PieceKind, SentencePiece, VocabPiece};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

impl Tokenizer {
    /// The tokenizer in the keys `tokenizer.ggml.*` of the GGUF file `path`.
    ///
    /// As llama.cpp does, it puts a space in front of each stretch of text between special tokens, which transformers calls legacy.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it is of another kind than LLaMA's, [`Error::File`] if it is malformed.
    pub fn from_gguf(path: &Path, metadata: &Map<String, Value>) -> Result<Self> {
        let key = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}"));
        let unsupported = |name: &str, why: &str| {
            let value = key(name).map_or_else(|| "absent".to_owned(), Value::to_string);
            let value: String = value.chars().take(60).collect();
            Error::Unsupported(format!("{}: `tokenizer.ggml.{name}` is {value}: {why}", path.display()))
        };
        if key("model").and_then(Value::as_str) != Some("llama") {
            return Err(unsupported("model", "of the tokenizers in GGUF files, LLaMA's (`llama`) is read"));
        }
        let flag = |name: &str, default: bool| key(name).and_then(Value::as_bool).unwrap_or(default);
        if flag("add_eos_token", false) {
            return Err(unsupported("add_eos_token", "prompts end without an end token"));
        }
        if flag("remove_extra_whitespaces", false) || key("precompiled_charsmap").is_some() {
            return Err(unsupported("precompiled_charsmap", "a tokenizer that normalises its text is not supported"));
        }
        let model = pieces(metadata).map_err(|problem| Error::file(path, problem))?;
        from_pieces(&model, flag("add_bos_token", true), &Companions::default()).map_err(|problem| Error::file(path, problem))
    }
}

/// The pieces and special ids.
fn pieces(metadata: &Map<String, Value>) -> std::result::Result<SentencePiece, String> {
    let key = |name: &str| metadata.get(&format!("tokenizer.ggml.{name}"));
    let list = |name: &str| {
        let list = key(name).and_then(Value::as_array);
        list.ok_or_else(|| format!("`tokenizer.ggml.{name}` is missing or no list"))
    };
    let (tokens, scores, kinds) = (list("tokens")?, list("scores")?, list("token_type")?);
    if tokens.is_empty() || tokens.len() > MAX_PIECES || scores.len() != tokens.len() || kinds.len() != tokens.len() {
        return Err(format!(
            "has {} tokens, {} scores and {} token types: expected as many of each, up to {MAX_PIECES}",
            tokens.len(),
            scores.len(),
            kinds.len()
        ));
    }
    let piece = |(id, token): (usize, &Value)| {
        let error = |what: &str, value: &Value| format!("the {what} of token {id} is {value}");
        let text = token.as_str().filter(|t| !t.is_empty() && t.len() <= MAX_PIECE_BYTES);
        Ok(VocabPiece {
            text: text.ok_or_else(|| format!("token {id} is no text of 1 to {MAX_PIECE_BYTES} bytes"))?.to_owned(),
            score: scores[id].as_f64().ok_or_else(|| error("score", &scores[id]))? as f32,
            kind: kinds[id].as_u64().and_then(PieceKind::of_number).ok_or_else(|| error("type", &kinds[id]))?,
        })
    };
    let pieces = tokens.iter().enumerate().map(piece).collect::<std::result::Result<Vec<_>, String>>()?;
    let id = |name: &str, default: Option<u32>| match key(name) {
        None => Ok(default),
        Some(id) => match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => Err(format!("`tokenizer.ggml.{name}` is {id}: expected the id of a token")),
        },
    };
    let model = SentencePiece {
        add_dummy_prefix: key("add_space_prefix").and_then(Value::as_bool).unwrap_or(true),
        byte_fallback: pieces.iter().any(|p| p.kind == PieceKind::Byte),
        pieces,
        unk_id: id("unknown_token_id", Some(0))?.unwrap_or_default(),
        bos_id: id("bos_token_id", Some(1))?,
        eos_id: id("eos_token_id", Some(2))?,
        pad_id: id("padding_token_id", None)?,
    };
    model.check_ids()?;
    Ok(model)
}
