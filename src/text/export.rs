//! Tokenizer files of one layout from those of the other: the `tokenizer.json` that llava-hf's processor reads, and the SentencePiece
//! `tokenizer.model` that LLaVA's own code does.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Model;

use super::added::{AddedToken, IMAGE_MARK};
use super::decode::Spelling;
use super::open::{MAX_JSON_BYTES, read, read_merges};
use super::sentencepiece::{PieceKind, SentencePiece, VocabPiece};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Names and contents.
pub type Files = Vec<(&'static str, Vec<u8>)>;

/// What llava-hf calls the token that fills up short rows.
const PAD: &str = "<pad>";
/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";
const TOKENIZER_JSON: &str = "tokenizer.json";
const TOKENIZER_MODEL: &str = "tokenizer.model";

/// Tokenizer files for llava-hf, from those in `folder`: with the tokens `<image>` and `<pad>`, which get the next ids where there are none.
///
/// Of an original checkpoint (`is_original`) SentencePiece's space comes in front of every stretch between added tokens, which around an
/// image is what LLaVA's own code does.
///
/// # Errors
/// As [`Tokenizer::open`]; [`Error::File`] if ids are left out, since transformers numbers added tokens by their places.
pub fn for_hf(folder: &Path, is_original: bool) -> Result<Files> {
    let tokenizer = Tokenizer::open(folder)?;
    let mut added = added_tokens(&tokenizer);
    let pad = text(&tokenizer, tokenizer.pad()).filter(|_| !is_original).unwrap_or_else(|| PAD.to_owned());
    for content in [IMAGE_MARK, &pad] {
        if tokenizer.token_to_id(content).is_none() {
            let next = added.iter().map(|t| t.id + 1).max().unwrap_or(0).max(tokenizer.n_ids() as u32);
            added.push(AddedToken::special(next, content));
        }
    }
    let (path, model) = (folder.join(TOKENIZER_JSON), read_model(folder)?);
    let mut file = match read_json(&path)? {
        Some(file) => file,
        None => {
            let bytes = model.as_ref().ok_or_else(|| Error::file(&path, "missing"))?;
            let problem = |e| Error::file(folder.join(TOKENIZER_MODEL), e);
            from_pieces(&SentencePiece::parse(bytes).map_err(problem)?, &tokenizer).map_err(problem)?
        }
    };
    if is_original && is_sentencepiece(&tokenizer) {
        file.insert("normalizer".to_owned(), spaces_in_front(tokenizer.slow.legacy, tokenizer.slow.dummy_prefix));
        file.insert("pre_tokenizer".to_owned(), Value::Null);
    }
    let n_pieces = tokenizer.model.get_vocab_size();
    let beyond = added.iter().filter(|t| tokenizer.model.token_to_id(&t.content).is_none()).map(|t| t.id as usize);
    if let Some((expected, id)) = (n_pieces..).zip(beyond).find(|(expected, id)| expected != id) {
        let problem = format!("an added token has the id {id}, and none {expected}: tokenizer.json cannot leave ids out");
        return Err(Error::file(folder, problem));
    }
    file.insert("added_tokens".to_owned(), added.iter().map(described).collect());
    let config = json!({
        "add_bos_token": tokenizer.special_ids.add_bos,
        "add_eos_token": false,
        "added_tokens_decoder": decoder(&added),
        "bos_token": text(&tokenizer, tokenizer.bos()),
        "clean_up_tokenization_spaces": false,
        "eos_token": text(&tokenizer, tokenizer.eos()),
        "legacy": tokenizer.slow.legacy,
        "pad_token": pad,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": if is_sentencepiece(&tokenizer) { "LlamaTokenizer" } else { "PreTrainedTokenizerFast" },
        "unk_token": text(&tokenizer, tokenizer.unk()),
    });
    let mut files = vec![(TOKENIZER_JSON, lines(&Value::Object(file))), ("tokenizer_config.json", lines(&config))];
    files.extend(model.map(|bytes| (TOKENIZER_MODEL, bytes)));
    Ok(files)
}

/// Tokenizer files for LLaVA's own code, from those in `folder`. Of a llava-hf checkpoint (`is_hf`) `<image>` and `<pad>` are left out where
/// nothing comes after them: LLaVA has no id for the one and pads with the unknown token. Where there is no `tokenizer.model`, one is made of
/// `tokenizer.json`, if a SentencePiece model implies just those merges; if none does, LLaVA's code gets the fast tokenizer.
///
/// # Errors
/// As [`Tokenizer::open`].
pub fn for_original(folder: &Path, is_hf: bool, chat_template: Option<&str>) -> Result<Files> {
    let tokenizer = Tokenizer::open(folder)?;
    let (bos, eos, unk, pad) = (tokenizer.bos(), tokenizer.eos(), tokenizer.unk(), tokenizer.pad());
    let n_pieces = tokenizer.model.get_vocab_size();
    let is_left_out = |id: u32| {
        let fills_up = pad == Some(id) && ![bos, eos, unk].contains(&pad);
        fills_up || tokenizer.image() == Some(id)
    };
    let mut n_ids = tokenizer.n_ids();
    while is_hf && n_ids > n_pieces && is_left_out(n_ids as u32 - 1) {
        n_ids -= 1;
    }
    let mut added = added_tokens(&tokenizer);
    added.retain(|t| (t.id as usize) < n_ids);
    let json = read_json(&folder.join(TOKENIZER_JSON))?;
    let mut config = json!({
        "add_bos_token": tokenizer.special_ids.add_bos,
        "add_eos_token": false,
        "added_tokens_decoder": decoder(&added),
        "bos_token": text(&tokenizer, bos),
        "clean_up_tokenization_spaces": false,
        "eos_token": text(&tokenizer, eos),
        "legacy": tokenizer.slow.legacy,
        "pad_token": text(&tokenizer, pad.filter(|&id| (id as usize) < n_ids).or(unk)),
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": text(&tokenizer, unk),
    });
    if let Some(template) = chat_template {
        config["chat_template"] = template.into();
    }
    // What tokenizer.json says counts in llava-hf, whatever `legacy` is beside it.
    let prefix = json.as_ref().map_or(Prefix::Every, Prefix::of);
    if is_hf && json.is_some() {
        config["legacy"] = (prefix != Prefix::First).into();
    }
    // A model beside a tokenizer.json that somebody has added pieces to is of no use any more.
    let own = read_model(folder)?.filter(|bytes| SentencePiece::parse(bytes).is_ok_and(|model| has_pieces(&tokenizer, &model)));
    let model = own.or_else(|| Some(to_pieces(json.as_ref()?, &tokenizer, prefix != Prefix::None)?.to_bytes()));
    let mut files = Vec::new();
    match (model, json) {
        (Some(model), _) => files.push((TOKENIZER_MODEL, model)),
        (None, Some(mut file)) => {
            file.insert("added_tokens".to_owned(), added.iter().map(described).collect());
            config["tokenizer_class"] = "PreTrainedTokenizerFast".into();
            files.push((TOKENIZER_JSON, lines(&Value::Object(file))));
        }
        (None, None) => unreachable!("one of the two was opened"),
    }
    files.push(("tokenizer_config.json", lines(&config)));
    Ok(files)
}

/// Whether it spells spaces and bytes as SentencePiece does, and not as GPT-2.
fn is_sentencepiece(tokenizer: &Tokenizer) -> bool {
    matches!(tokenizer.spellings.spelling, Spelling::SentencePiece { .. })
}

/// Whether its vocabulary is that of the model.
fn has_pieces(tokenizer: &Tokenizer, model: &SentencePiece) -> bool {
    let mut pieces = (0u32..).zip(&model.pieces);
    model.pieces.len() == tokenizer.model.get_vocab_size()
        && pieces.all(|(id, piece)| tokenizer.model.token_to_id(&piece.text) == Some(id))
}

fn read_model(folder: &Path) -> Result<Option<Vec<u8>>> {
    read(&folder.join(TOKENIZER_MODEL), MAX_JSON_BYTES)
}

fn read_json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(bytes) = read(path, MAX_JSON_BYTES)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::file(path, format!("not a JSON object: {e}")))
}

/// The content of a JSON file.
fn lines(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

fn text(tokenizer: &Tokenizer, id: Option<u32>) -> Option<String> {
    tokenizer.id_to_token(id?)
}

/// Every added token, by id.
fn added_tokens(tokenizer: &Tokenizer) -> Vec<AddedToken> {
    let mut added: Vec<_> = tokenizer.added.iter().cloned().collect();
    added.sort_by_key(|t| t.id);
    added
}

/// As `tokenizer.json` lists it.
fn described(token: &AddedToken) -> Value {
    json!({
        "id": token.id, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip,
        "normalized": token.normalized, "special": token.special,
    })
}

/// As `tokenizer_config.json` lists them.
fn decoder(added: &[AddedToken]) -> Value {
    let entry = |token: &AddedToken| {
        let mut value = described(token);
        value.as_object_mut().and_then(|map| map.remove("id"));
        (token.id.to_string(), value)
    };
    Value::Object(added.iter().map(entry).collect())
}

/// The normaliser that writes spaces as SentencePiece does, one in front of every stretch between added tokens.
fn spaces_in_front(legacy: bool, dummy_prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    match !legacy || dummy_prefix {
        true => json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}),
        false => replace,
    }
}

/// Before which stretches a `tokenizer.json` puts SentencePiece's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prefix {
    None,
    First,
    Every,
}

impl Prefix {
    fn of(file: &Map<String, Value>) -> Self {
        let says = |part: &str, kind: &str| file.get(part).is_some_and(|part| part.to_string().contains(kind));
        let metaspace = file.get("pre_tokenizer").filter(|p| p["type"] == "Metaspace");
        match metaspace.map(|p| p["prepend_scheme"].as_str().unwrap_or("always")) {
            Some("never") => Self::None,
            Some(_) => Self::First,
            None if says("normalizer", "\"Prepend\"") => Self::Every,
            None => Self::None,
        }
    }
}

/// The `tokenizer.json` of a SentencePiece model, as transformers' converter makes it, without its added tokens.
fn from_pieces(model: &SentencePiece, tokenizer: &Tokenizer) -> Result<Map<String, Value>, String> {
    let vocab: Map<String, Value> = (0u32..).zip(&model.pieces).map(|(id, piece)| (piece.text.clone(), json!(id))).collect();
    let (legacy, prefix) = (tokenizer.slow.legacy, model.add_dummy_prefix);
    let bos = tokenizer.bos().filter(|_| tokenizer.special_ids.add_bos).zip(text(tokenizer, tokenizer.bos()));
    let template = bos.map(|(id, bos)| {
        let first = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let text = |id: &str, type_id: u8| json!({"Sequence": {"id": id, "type_id": type_id}});
        let second = json!({"SpecialToken": {"id": bos, "type_id": 1}});
        json!({
            "type": "TemplateProcessing",
            "single": [first, text("A", 0)],
            "pair": [first, text("A", 0), second, text("B", 1)],
            "special_tokens": {&bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        })
    });
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if !legacy || prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let first = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": false});
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": if legacy { spaces_in_front(legacy, prefix) } else { Value::Null },
        "pre_tokenizer": if legacy { Value::Null } else { first },
        "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": model.text(model.unk_id),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": model.byte_fallback,
            "vocab": vocab,
            // In pairs since tokenizers 0.20; as one string they are read by all.
            "merges": model.merges()?.iter().map(|(left, right)| format!("{left} {right}")).collect::<Vec<_>>(),
        },
    });
    match file {
        Value::Object(file) => Ok(file),
        _ => unreachable!("an object is written above"),
    }
}

/// The SentencePiece model that implies just the merges of a `tokenizer.json`, if there is one.
fn to_pieces(file: &Map<String, Value>, tokenizer: &Tokenizer, add_dummy_prefix: bool) -> Option<SentencePiece> {
    if !is_sentencepiece(tokenizer) {
        return None;
    }
    let vocab = tokenizer.model.get_vocab();
    let n_pieces = vocab.len();
    let within = |id: Option<u32>| id.filter(|&id| (id as usize) < n_pieces);
    let unk_id = within(tokenizer.unk())?;
    let is_byte = |text: &str| text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
    let kind = |id: u32, text: &str| match tokenizer.added.iter().find(|t| t.id == id) {
        _ if id == unk_id => PieceKind::Unknown,
        Some(token) if token.special => PieceKind::Control,
        Some(_) => PieceKind::UserDefined,
        None if is_byte(text) => PieceKind::Byte,
        None => PieceKind::Normal,
    };
    let mut pieces = vec![VocabPiece { text: String::new(), score: 0.0, kind: PieceKind::Normal }; n_pieces];
    for (text, &id) in &vocab {
        *pieces.get_mut(id as usize)? = VocabPiece { text: text.clone(), score: 0.0, kind: kind(id, text) };
    }
    // Old converters list merges that would give a special token; none is ever made.
    let is_normal = |text: &str| vocab.get(text).is_some_and(|&id| pieces[id as usize].kind == PieceKind::Normal);
    let mut listed = read_merges(file.get("model")?).ok()?;
    listed.retain(|(left, right)| is_normal(left) && is_normal(right) && is_normal(&format!("{left}{right}")));
    // The better the rank of its merges, the higher the score of a piece, which is one for all merges that give it.
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut last = String::new();
    for (left, right) in &listed {
        let whole = format!("{left}{right}");
        let next = ranks.len();
        if last != whole && ranks.insert(whole.clone(), next).is_some() {
            return None;
        }
        last = whole;
    }
    // What no merge gives comes after all else; nobody asks for its score.
    let mut n_ranks = ranks.len();
    for piece in pieces.iter_mut().filter(|piece| piece.kind == PieceKind::Normal) {
        let rank = ranks.get(&piece.text).copied().unwrap_or(n_ranks);
        n_ranks += usize::from(rank == n_ranks);
        piece.score = -(rank as f32);
    }
    let byte_fallback = pieces.iter().any(|piece| piece.kind == PieceKind::Byte);
    let [bos_id, eos_id, pad_id] = [tokenizer.bos(), tokenizer.eos(), tokenizer.pad()].map(within);
    let model = SentencePiece { pieces, add_dummy_prefix, byte_fallback, unk_id, bos_id, eos_id, pad_id };
    model.check_ids().ok()?;
    let implied: HashSet<(String, String)> = model.merges().ok()?.into_iter().collect();
    (implied == listed.into_iter().collect()).then_some(model)
}
