//! Tokenizer files of a checkpoint folder to a [`Tokenizer`]: `tokenizer.json` or `tokenizer.model`, with what
//! `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` add to them.
//!
//! These files are downloaded, so every field is checked before the `tokenizers` crate sees it: its own reader trusts them (a merge
//! whose result is longer than any piece makes it panic).

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper, PreTokenizerWrapper};

use super::added::{AddedToken, AddedTokens};
use super::decode::{Spelling, Spellings};
use super::sentencepiece::{PieceKind, SentencePiece};
use super::tokenizer::{SlowRules, SpecialIds, Tokenizer};
use crate::error::{Error, Result};

/// Gemma's `tokenizer.json`, the largest in use, has 33 MB.
pub(super) const MAX_JSON_BYTES: u64 = 128 << 20;
/// LLaMA's `tokenizer.model` has 0.5 MB.
const MAX_MODEL_BYTES: u64 = 32 << 20;
/// Ids index a table, so a wild one must not decide its size.
const MAX_IDS: u32 = 1 << 22;
/// LLaMA 3 adds 256.
const MAX_ADDED_TOKENS: usize = 1 << 14;
/// LLaMA's normaliser has 2 steps, each making at most 3 bytes of one.
const MAX_NORMALIZERS: usize = 8;
const MAX_REPLACEMENT_BYTES: usize = 16;

/// `Err` in words; the caller knows which file.
type Parsed<T> = std::result::Result<T, String>;

/// The files beside a vocabulary that say more about it; all may be absent.
#[derive(Default)]
pub(super) struct Companions {
    /// `tokenizer_config.json`.
    config: Map<String, Value>,
    /// `special_tokens_map.json`.
    special: Map<String, Value>,
    /// `added_tokens.json`.
    added: Map<String, Value>,
}

impl Tokenizer {
    /// Opens the tokenizer of a checkpoint folder: `tokenizer.json` if it is there, else the SentencePiece `tokenizer.model`.
    ///
    /// # Errors
    /// [`Error::File`] naming the file that is missing, malformed, or of a kind that no LLaVA has; [`Error::Io`] for one that cannot
    /// be read.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let companion = |name: &str| -> Result<Map<String, Value>> {
            let path = folder.join(name);
            match read(&path, MAX_JSON_BYTES)? {
                Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, format!("not a JSON object: {e}"))),
                None => Ok(Map::new()),
            }
        };
        let companions = Companions {
            config: companion("tokenizer_config.json")?,
            special: companion("special_tokens_map.json")?,
            added: companion("added_tokens.json")?,
        };
        let json = folder.join("tokenizer.json");
        if let Some(bytes) = read(&json, MAX_JSON_BYTES)? {
            return from_json(&bytes, &companions).map_err(|e| Error::file(&json, e));
        }
        let model = folder.join("tokenizer.model");
        if let Some(bytes) = read(&model, MAX_MODEL_BYTES)? {
            return from_sentencepiece(&bytes, &companions).map_err(|e| Error::file(&model, e));
        }
        Err(Error::file(folder, "no tokenizer.json and no tokenizer.model in it"))
    }

    /// A tokenizer from the bytes of a `tokenizer.json`, or of a `tokenizer.model` where they are no JSON, without companions.
    ///
    /// # Errors
    /// [`Error::File`] with the pretended path `tokenizer`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let parse = if bytes.trim_ascii_start().starts_with(b"{") { from_json } else { from_sentencepiece };
        parse(bytes, &Companions::default()).map_err(|e| Error::file("tokenizer", e))
    }
}

/// The content of a file; `None` if there is none.
pub(super) fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>> {
    let n_bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    if n_bytes > max_bytes {
        return Err(Error::file(path, format!("{n_bytes} bytes; no tokenizer has more than {max_bytes}")));
    }
    std::fs::read(path).map(Some).map_err(|e| Error::io(path, e))
}

fn from_sentencepiece(bytes: &[u8], companions: &Companions) -> Parsed<Tokenizer> {
    from_pieces(&SentencePiece::parse(bytes)?, true, companions)
}

/// A tokenizer of the pieces of a SentencePiece model, wherever they were read.
pub(super) fn from_pieces(model: &SentencePiece, add_bos: bool, companions: &Companions) -> Parsed<Tokenizer> {
    let legacy = companions.flag("legacy").unwrap_or(true);
    let vocab: Map<String, Value> = (0u32..).zip(&model.pieces).map(|(id, p)| (p.text.clone(), json!(id))).collect();
    let bpe = Bpe {
        vocab: read_vocab(&vocab)?,
        merges: model.merges()?,
        unk: model.text(model.unk_id).map(str::to_owned),
        fuse_unk: true,
        byte_fallback: model.byte_fallback,
        ignore_merges: false,
    };
    // What transformers' converter makes of a slow LlamaTokenizer.
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prepend = json!({"type": "Prepend", "prepend": "\u{2581}"});
    let (normalizer, pre_tokenizer) = match (legacy, model.add_dummy_prefix) {
        (true, true) => (json!({"type": "Sequence", "normalizers": [prepend, replace]}), Value::Null),
        (true, false) => (replace, Value::Null),
        (false, _) => {
            (Value::Null, json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false}))
        }
    };
    let special = |p: PieceKind| matches!(p, PieceKind::Control | PieceKind::Unknown | PieceKind::UserDefined);
    let added = (0u32..)
        .zip(&model.pieces)
        .filter(|(_, p)| special(p.kind))
        .map(|(id, p)| AddedToken { special: p.kind != PieceKind::UserDefined, ..AddedToken::special(id, p.text.clone()) });
    let ids = SpecialIds { add_bos, bos: model.bos_id, eos: model.eos_id, unk: Some(model.unk_id), pad: model.pad_id };
    Parts {
        bpe,
        normalizer: read_normalizer(&normalizer)?,
        pre_tokenizer: read_pre_tokenizer(&pre_tokenizer)?,
        added: added.collect(),
        spelling: Spelling::SentencePiece { strip_first_space: !legacy || model.add_dummy_prefix },
        ids,
        slow: SlowRules { legacy, dummy_prefix: model.add_dummy_prefix },
    }
    .build(companions)
}

fn from_json(bytes: &[u8], companions: &Companions) -> Parsed<Tokenizer> {
    let file: Map<String, Value> = serde_json::from_slice(bytes).map_err(|e| format!("not a JSON object: {e}"))?;
    let field = |name: &str| file.get(name).unwrap_or(&Value::Null);
    let bpe = read_bpe(field("model"))?;
    let empty = Vec::new();
    let listed = field("added_tokens").as_array().unwrap_or(&empty);
    if listed.len() > MAX_ADDED_TOKENS {
        return Err(format!("{} added tokens; more than {MAX_ADDED_TOKENS} are not supported", listed.len()));
    }
    let added = listed.iter().map(|t| read_added(t, t.get("id").and_then(as_id))).collect::<Parsed<Vec<_>>>()?;
    let spelling = read_decoder(field("decoder"))?;
    // Which token comes first is the post-processor's word; which one it is, and the others, come by their usual names.
    let first = first_token(field("post_processor"));
    let id = |name: &str| added.iter().find(|t| t.content == name).map(|t| t.id).or_else(|| bpe.vocab.get(name).copied());
    let bos = first.as_deref().and_then(id).or_else(|| id("<s>"));
    let unk = bpe.unk.as_deref().and_then(id);
    let ids = SpecialIds { add_bos: first.is_some(), bos, eos: id("</s>"), unk, pad: id("<pad>") };
    Parts {
        normalizer: read_normalizer(field("normalizer"))?,
        pre_tokenizer: read_pre_tokenizer(field("pre_tokenizer"))?,
        slow: SlowRules { legacy: companions.flag("legacy").unwrap_or(true), dummy_prefix: true },
        bpe,
        added,
        spelling,
        ids,
    }
    .build(companions)
}

impl Companions {
    fn flag(&self, name: &str) -> Option<bool> {
        self.config.get(name)?.as_bool()
    }

    /// The text of a token with a role (`bos_token`): a string, or an object with `content`.
    fn role(&self, name: &str) -> Option<&str> {
        [&self.config, &self.special].into_iter().find_map(|map| {
            let value = map.get(name)?;
            value.as_str().or_else(|| value.get("content")?.as_str())
        })
    }

    /// The tokens that these files add or describe anew, in order of id.
    fn tokens(&self) -> Parsed<Vec<AddedToken>> {
        let mut tokens = Vec::new();
        for (content, id) in &self.added {
            let id = as_id(id).ok_or_else(|| format!("added_tokens.json: the id of `{content}` is {id}"))?;
            tokens.push(AddedToken { special: false, ..AddedToken::special(id, content.clone()) });
        }
        if let Some(Value::Object(decoder)) = self.config.get("added_tokens_decoder") {
            for (id, token) in decoder {
                let id = id.parse().ok().filter(|&id| id < MAX_IDS);
                tokens.push(read_added(token, id).map_err(|e| format!("tokenizer_config.json, added_tokens_decoder: {e}"))?);
            }
        }
        if tokens.len() > MAX_ADDED_TOKENS {
            return Err(format!("the files beside it add {} tokens; more than {MAX_ADDED_TOKENS} are not supported", tokens.len()));
        }
        tokens.sort_by_key(|t| t.id);
        Ok(tokens)
    }
}

/// A tokenizer before its parts are put together and checked against each other.
struct Parts {
    bpe: Bpe,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    added: Vec<AddedToken>,
    spelling: Spelling,
    ids: SpecialIds,
    slow: SlowRules,
}

impl Parts {
    fn build(mut self, companions: &Companions) -> Parsed<Tokenizer> {
        self.added.extend(companions.tokens()?);
        for token in &self.added {
            if let Some(id) = self.bpe.vocab.get(&token.content).filter(|&&id| id != token.id) {
                return Err(format!("`{}` is {id} in the vocabulary and {} as an added token", token.content, token.id));
            }
        }
        let find = |content: &str| {
            let added = self.added.iter().find(|t| t.content == content).map(|t| t.id);
            added.or_else(|| self.bpe.vocab.get(content).copied())
        };
        let mut named = Vec::new();
        let mut role = |name: &str, id: &mut Option<u32>| -> Parsed<()> {
            if let Some(content) = companions.role(name) {
                let found = find(content).ok_or_else(|| format!("{name} is `{content}`, which it does not have"))?;
                named.push(AddedToken::special(found, content));
                *id = Some(found);
            }
            Ok(())
        };
        role("bos_token", &mut self.ids.bos)?;
        role("eos_token", &mut self.ids.eos)?;
        role("unk_token", &mut self.ids.unk)?;
        role("pad_token", &mut self.ids.pad)?;
        self.ids.add_bos = companions.flag("add_bos_token").unwrap_or(self.ids.add_bos);
        // A token that has a role is special even where no file lists it as added.
        for token in named {
            if !self.added.iter().any(|t| t.content == token.content) {
                self.added.push(token);
                continue;
            }
            self.added.iter_mut().filter(|t| t.content == token.content).for_each(|t| t.special = true);
        }
        let largest = self.bpe.vocab.values().copied().chain(self.added.iter().map(|t| t.id)).max().unwrap_or(0);
        let n_ids = largest as usize + 1;
        let mut spellings = Spellings::new(self.spelling, n_ids);
        spellings.fill(self.bpe.vocab.iter().map(|(piece, &id)| (id, piece.as_str())));
        spellings.fill(self.added.iter().map(|t| (t.id, t.content.as_str())));
        self.added.iter().filter(|t| t.special).for_each(|t| spellings.silence(t.id));
        let normalize = |text: &str| {
            let mut normalized = NormalizedString::from(text);
            if let Some(normalizer) = &self.normalizer {
                // A normaliser that fails fails on every text; it is reported when one is encoded.
                let _ = normalizer.normalize(&mut normalized);
            }
            normalized.get().to_owned()
        };
        let added = AddedTokens::new(self.added, normalize);
        Ok(Tokenizer {
            model: self.bpe.build()?,
            normalizer: self.normalizer,
            pre_tokenizer: self.pre_tokenizer,
            added,
            spellings,
            special_ids: self.ids,
            slow: self.slow,
            n_ids,
        })
    }
}

/// A BPE model before it is checked.
struct Bpe {
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
    unk: Option<String>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
}

impl Bpe {
    fn build(self) -> Parsed<BPE> {
        if let Some(unk) = self.unk.as_ref().filter(|u| !self.vocab.contains_key(*u)) {
            return Err(format!("its unknown token `{unk}` is not in the vocabulary"));
        }
        for (left, right) in &self.merges {
            for piece in [left, right, &format!("{left}{right}")] {
                if !self.vocab.contains_key(piece) {
                    return Err(format!("the merge of `{left}` and `{right}` needs `{piece}`, which is not in the vocabulary"));
                }
            }
        }
        let vocab: Vocab = self.vocab.into_iter().collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, self.merges)
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        if let Some(unk) = self.unk {
            builder = builder.unk_token(unk);
        }
        builder.build().map_err(|e| e.to_string())
    }
}

fn as_id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok().filter(|&id| id < MAX_IDS)
}

fn read_vocab(vocab: &Map<String, Value>) -> Parsed<HashMap<String, u32>> {
    let mut taken = HashSet::with_capacity(vocab.len());
    vocab
        .iter()
        .map(|(piece, id)| {
            let id = as_id(id).ok_or_else(|| format!("the id of `{piece}` is {id}"))?;
            match taken.insert(id) {
                true => Ok((piece.clone(), id)),
                false => Err(format!("two pieces have the id {id}, one is `{piece}`")),
            }
        })
        .collect()
}

fn read_bpe(model: &Value) -> Parsed<Bpe> {
    let kind = model.get("type").and_then(Value::as_str);
    // Old files leave the type out.
    if !matches!(kind, None | Some("BPE")) {
        return Err(format!("a {} model; LLaVA's decoders use BPE and only that is supported", kind.unwrap_or_default()));
    }
    let flag = |name: &str| model.get(name).and_then(Value::as_bool).unwrap_or(false);
    for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(affix).and_then(Value::as_str).is_some_and(|s| !s.is_empty()) {
            return Err(format!("model.{affix} is not supported"));
        }
    }
    if model.get("dropout").and_then(Value::as_f64).is_some_and(|p| p != 0.0) {
        return Err("model.dropout would make the ids random; set it to null".into());
    }
    let vocab = model.get("vocab").and_then(Value::as_object).ok_or("model.vocab is missing or not an object")?;
    Ok(Bpe {
        vocab: read_vocab(vocab)?,
        merges: read_merges(model)?,
        unk: model.get("unk_token").and_then(Value::as_str).map(str::to_owned),
        fuse_unk: flag("fuse_unk"),
        byte_fallback: flag("byte_fallback"),
        ignore_merges: flag("ignore_merges"),
    })
}

/// The merges that the `model` of a `tokenizer.json` lists.
pub(super) fn read_merges(model: &Value) -> Parsed<Vec<(String, String)>> {
    let merges = model.get("merges").and_then(Value::as_array).ok_or("model.merges is missing or not a list")?;
    let merge = |merge: &Value| {
        // Files before 2024 write "a b", later ones ["a", "b"].
        let pair = match merge {
            Value::String(s) => s.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
                _ => None,
            },
            _ => None,
        };
        pair.ok_or_else(|| format!("model.merges holds {merge}, which is no pair of pieces"))
    };
    merges.iter().map(merge).collect()
}

fn read_added(token: &Value, id: Option<u32>) -> Parsed<AddedToken> {
    let content = token.get("content").and_then(Value::as_str).ok_or_else(|| format!("an added token without content: {token}"))?;
    let id = id.ok_or_else(|| format!("the added token `{content}` has no id below {MAX_IDS}"))?;
    let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
    Ok(AddedToken {
        id,
        content: content.to_owned(),
        lstrip: flag("lstrip"),
        rstrip: flag("rstrip"),
        single_word: flag("single_word"),
        normalized: flag("normalized"),
        special: flag("special"),
    })
}

fn read_normalizer(normalizer: &Value) -> Parsed<Option<NormalizerWrapper>> {
    fn check(step: &Value, n_steps: &mut usize) -> Parsed<()> {
        *n_steps += 1;
        if *n_steps > MAX_NORMALIZERS {
            return Err(format!("more than {MAX_NORMALIZERS} normalisers"));
        }
        let kind = step.get("type").and_then(Value::as_str).unwrap_or_default();
        for field in ["content", "prepend"] {
            if step.get(field).and_then(Value::as_str).is_some_and(|s| s.len() > MAX_REPLACEMENT_BYTES) {
                return Err(format!("normalizer {kind}: `{field}` is longer than {MAX_REPLACEMENT_BYTES} bytes"));
            }
        }
        match kind {
            "Sequence" => match step.get("normalizers").and_then(Value::as_array) {
                Some(steps) => steps.iter().try_for_each(|s| check(s, n_steps)),
                None => Err("normalizer Sequence without `normalizers`".into()),
            },
            "Prepend" | "Replace" | "Strip" | "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" => Ok(()),
            other => Err(format!("normalizer `{other}` is not supported")),
        }
    }
    if normalizer.is_null() {
        return Ok(None);
    }
    check(normalizer, &mut 0)?;
    serde_json::from_value(normalizer.clone()).map(Some).map_err(|e| format!("normalizer: {e}"))
}

fn read_pre_tokenizer(pre_tokenizer: &Value) -> Parsed<Option<PreTokenizerWrapper>> {
    if pre_tokenizer.is_null() {
        return Ok(None);
    }
    serde_json::from_value(pre_tokenizer.clone()).map(Some).map_err(|e| format!("pre_tokenizer: {e}"))
}

/// What a decoder makes of pieces: one of the two spellings that LLaVA's decoders use.
fn read_decoder(decoder: &Value) -> Parsed<Spelling> {
    let alone = [decoder.clone()];
    let steps = decoder.get("decoders").and_then(Value::as_array).map_or(&alone[..], Vec::as_slice);
    let (mut spelling, mut strip) = (None, false);
    for step in steps {
        let text = |name: &str| step.get(name).and_then(Value::as_str).unwrap_or_default();
        match text("type") {
            "ByteLevel" => spelling = Some(Spelling::ByteLevel),
            "Metaspace" => {
                spelling = Some(Spelling::SentencePiece { strip_first_space: false });
                let no_prefix = step.get("add_prefix_space") == Some(&Value::Bool(false)) || text("prepend_scheme") == "never";
                strip = !no_prefix;
            }
            "Replace" if text("content") == " " => spelling = Some(Spelling::SentencePiece { strip_first_space: false }),
            "Strip" => strip = text("content") == " " && step.get("start").and_then(Value::as_u64) == Some(1),
            "ByteFallback" | "Fuse" => {}
            other => return Err(format!("decoder `{other}` is not supported")),
        }
    }
    match spelling {
        Some(Spelling::SentencePiece { .. }) => Ok(Spelling::SentencePiece { strip_first_space: strip }),
        Some(Spelling::ByteLevel) => Ok(Spelling::ByteLevel),
        None => Err("it has no decoder of the SentencePiece or the byte-level kind".into()),
    }
}

/// The special token that a post-processor puts in front of a text.
fn first_token(post_processor: &Value) -> Option<String> {
    match post_processor.get("type")?.as_str()? {
        "TemplateProcessing" => {
            let first = post_processor.get("single")?.get(0)?.get("SpecialToken")?;
            Some(first.get("id")?.as_str()?.to_owned())
        }
        "Sequence" => post_processor.get("processors")?.as_array()?.iter().find_map(first_token),
        _ => None,
    }
}
