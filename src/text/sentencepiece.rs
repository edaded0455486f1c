//! Reader of `tokenizer.model`: the SentencePiece protobuf, walked by hand, and the BPE merges that it implies.
//!
//! Only what a LLaMA-style model holds is accepted (BPE, identity normalisation); anything else is an error that says so, since a
//! normalisation left out would silently give other tokens. Every length is checked before it is used, and every count is capped.

use std::collections::HashMap;

/// More pieces than any published vocabulary (Gemma: 256 k).
pub(super) const MAX_PIECES: usize = 1 << 19;
/// SentencePiece's own default limit is 16 characters; derivation of merges is quadratic in this.
pub(super) const MAX_PIECE_BYTES: usize = 256;
/// LLaMA implies 61 k.
const MAX_MERGES: usize = 1 << 22;

/// What a piece is for (`SentencePiece.Type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// An ordinary piece, made by merging.
    Normal,
    /// What stands for characters that the vocabulary lacks.
    Unknown,
    /// `<s>`, `</s>`: never made from text.
    Control,
    /// A string that is always one token.
    UserDefined,
    /// A place left empty.
    Unused,
    /// `<0x41>`: one byte of a character that the vocabulary lacks.
    Byte,
}

impl PieceKind {
    /// Its number there.
    fn number(self) -> u64 {
        (1..).find(|&number| Self::of_number(number) == Some(self)).expect("each kind has a number")
    }

    /// The kind that SentencePiece, and GGUF files with it, number so.
    pub(super) fn of_number(number: u64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// One row of the vocabulary; its id is its place.
#[derive(Clone, Debug, PartialEq)]
pub struct VocabPiece {
    /// Its text, spaces written as U+2581.
    pub text: String,
    /// Pieces with a higher score are merged first.
    pub score: f32,
    /// What it is for.
    pub kind: PieceKind,
}

/// Content of a `tokenizer.model`.
#[derive(Clone, Debug, PartialEq)]
pub struct SentencePiece {
    /// The vocabulary in order of id.
    pub pieces: Vec<VocabPiece>,
    /// Whether a text gets a space in front of it.
    pub add_dummy_prefix: bool,
    /// Whether unknown characters are spelt in bytes.
    pub byte_fallback: bool,
    /// Id of the unknown token.
    pub unk_id: u32,
    /// Id of the token that begins a text.
    pub bos_id: Option<u32>,
    /// Id of the token that ends a text.
    pub eos_id: Option<u32>,
    /// Id of the padding token.
    pub pad_id: Option<u32>,
}

/// One field of a protobuf message.
enum Field<'a> {
    Varint(u64),
    Fixed32([u8; 4]),
    Bytes(&'a [u8]),
    /// A double: never read, only stepped over.
    Fixed64,
}

/// The fields of a message, in order; a damaged one ends the walk with an error.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or("ends inside a number")?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number longer than 10 bytes".into())
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let n = usize::try_from(n).ok().filter(|&n| n <= self.0.len()).ok_or("a field longer than the file")?;
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        Ok(head)
    }

    /// The number and content of the next field; `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(n)?)
            }
            5 => {
                let b = self.take(4)?;
                Field::Fixed32([b[0], b[1], b[2], b[3]])
            }
            wire => return Err(format!("not a protobuf: wire type {wire}")),
        };
        Ok(Some((key >> 3, field)))
    }
}

impl SentencePiece {
    /// Reads the bytes of a `tokenizer.model`.
    ///
    /// # Errors
    /// In words, without the name of the file: bytes that are no SentencePiece model, or a model of a kind that LLaMA does not use.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            add_dummy_prefix: true,
            byte_fallback: false,
            unk_id: 0,
            bos_id: Some(1),
            eos_id: Some(2),
            pad_id: None,
        };
        // Defaults of sentencepiece_model.proto: unigram, extra spaces removed.
        let (mut kind, mut remove_extra_whitespaces, mut escape_whitespaces) = (1, true, true);
        let mut fields = Fields(bytes);
        while let Some((number, field)) = fields.next()? {
            match (number, field) {
                (1, Field::Bytes(piece)) => {
                    if model.pieces.len() == MAX_PIECES {
                        return Err(format!("more than {MAX_PIECES} pieces"));
                    }
                    let id = model.pieces.len();
                    model.pieces.push(parse_piece(piece).map_err(|e| format!("piece {id}: {e}"))?);
                }
                (2, Field::Bytes(trainer)) => {
                    let mut fields = Fields(trainer);
                    while let Some((number, field)) = fields.next()? {
                        match (number, field) {
                            (3, Field::Varint(v)) => kind = v,
                            (24, Field::Varint(1)) => {
                                return Err("spaces are suffixes (treat_whitespace_as_suffix): not supported".into());
                            }
                            (35, Field::Varint(v)) => model.byte_fallback = v != 0,
                            // Ids are int32; -1, "there is none", comes as 2^64 - 1.
                            (40, Field::Varint(v)) => model.unk_id = u32::try_from(v).map_err(|_| "it has no unknown token")?,
                            (41, Field::Varint(v)) => model.bos_id = u32::try_from(v).ok(),
                            (42, Field::Varint(v)) => model.eos_id = u32::try_from(v).ok(),
                            (43, Field::Varint(v)) => model.pad_id = u32::try_from(v).ok(),
                            _ => {}
                        }
                    }
                }
                (3, Field::Bytes(normalizer)) => {
                    let mut fields = Fields(normalizer);
                    while let Some((number, field)) = fields.next()? {
                        match (number, field) {
                            (2, Field::Bytes(map)) if !map.is_empty() => {
                                return Err(
                                    "it normalises its text (precompiled_charsmap); only `identity` models are supported".into()
                                );
                            }
                            (3, Field::Varint(v)) => model.add_dummy_prefix = v != 0,
                            (4, Field::Varint(v)) => remove_extra_whitespaces = v != 0,
                            (5, Field::Varint(v)) => escape_whitespaces = v != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("no pieces: not a SentencePiece model".into());
        }
        match kind {
            2 => {}
            1 => return Err("a unigram model; LLaMA's are BPE and only those are supported".into()),
            other => return Err(format!("model type {other}; only BPE (2) is supported")),
        }
        if remove_extra_whitespaces || !escape_whitespaces {
            return Err(
                "it removes or keeps spaces in a way that LLaMA's models do not (remove_extra_whitespaces, escape_whitespaces)"
                    .into(),
            );
        }
        model.check_ids()?;
        Ok(model)
    }

    /// The bytes of a `tokenizer.model` that [`parse`](Self::parse), and SentencePiece, read as this.
    pub fn to_bytes(&self) -> Vec<u8> {
        let text = |id: Option<u32>| id.and_then(|id| self.text(id)).map(str::as_bytes);
        let mut out = Vec::new();
        for piece in &self.pieces {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, piece.text.as_bytes());
            put_varint(&mut message, 2 << 3 | 5);
            message.extend(piece.score.to_le_bytes());
            put_number(&mut message, 3, piece.kind.number());
            put_bytes(&mut out, 1, &message);
        }
        let mut trainer = Vec::new();
        for (number, value) in [(3, 2), (4, self.pieces.len() as u64), (35, self.byte_fallback.into())] {
            put_number(&mut trainer, number, value);
        }
        // Ids are int32; -1 says that there is none.
        let ids = [Some(self.unk_id), self.bos_id, self.eos_id, self.pad_id];
        for (number, id) in (40..).zip(ids) {
            put_number(&mut trainer, number, id.map_or(u64::MAX, u64::from));
        }
        for (number, id) in (45..).zip(ids) {
            text(id).inspect(|text| put_bytes(&mut trainer, number, text));
        }
        put_bytes(&mut out, 2, &trainer);
        let mut normalizer = Vec::new();
        put_bytes(&mut normalizer, 1, b"identity");
        for (number, value) in [(3, self.add_dummy_prefix.into()), (4, 0), (5, 1)] {
            put_number(&mut normalizer, number, value);
        }
        put_bytes(&mut out, 3, &normalizer);
        out
    }

    /// Every special id points at a piece, and no two pieces are spelt alike.
    pub(super) fn check_ids(&self) -> Result<(), String> {
        let ids = [("unk", Some(self.unk_id)), ("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)];
        for (name, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= self.pieces.len()) {
                return Err(format!("{name}_id {id} is outside its {} pieces", self.pieces.len()));
            }
        }
        let mut seen = HashMap::with_capacity(self.pieces.len());
        for (id, piece) in self.pieces.iter().enumerate() {
            if let Some(first) = seen.insert(piece.text.as_str(), id) {
                return Err(format!("pieces {first} and {id} are both `{}`", piece.text));
            }
        }
        Ok(())
    }

    /// Text of a piece; `None` outside the vocabulary.
    pub fn text(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|p| p.text.as_str())
    }

    /// The merges that give what SentencePiece gives: every cut of a normal piece into two normal pieces, the higher score first,
    /// ties by the ids of the halves.
    ///
    /// # Errors
    /// A vocabulary built to imply more merges than any model has.
    pub fn merges(&self) -> Result<Vec<(String, String)>, String> {
        let normal = |p: &VocabPiece| p.kind == PieceKind::Normal;
        let ids: HashMap<&str, u32> =
            (0u32..).zip(&self.pieces).filter(|(_, p)| normal(p)).map(|(id, p)| (p.text.as_str(), id)).collect();
        let mut merges = Vec::new();
        for piece in self.pieces.iter().filter(|p| normal(p)) {
            for (cut, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(cut);
                if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                    merges.push((piece.score, l, r));
                }
            }
            if merges.len() > MAX_MERGES {
                return Err(format!("its pieces imply more than {MAX_MERGES} merges"));
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let text = |id: u32| self.pieces[id as usize].text.clone();
        Ok(merges.into_iter().map(|(_, l, r)| (text(l), text(r))).collect())
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A field with a number in it.
fn put_number(out: &mut Vec<u8>, number: u64, value: u64) {
    put_varint(out, number << 3);
    put_varint(out, value);
}

/// A field with bytes in it: a text, or another message.
fn put_bytes(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    put_varint(out, number << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn parse_piece(bytes: &[u8]) -> Result<VocabPiece, String> {
    let mut piece = VocabPiece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    let mut fields = Fields(bytes);
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) if text.len() > MAX_PIECE_BYTES => {
                return Err(format!("{} bytes long; the limit is {MAX_PIECE_BYTES}", text.len()));
            }
            (1, Field::Bytes(text)) => piece.text = std::str::from_utf8(text).map_err(|_| "not UTF-8")?.to_owned(),
            (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
            (3, Field::Varint(kind)) => {
                piece.kind = PieceKind::of_number(kind).ok_or_else(|| format!("kind {kind} is unknown"))?;
            }
            _ => {}
        }
    }
    match piece.text.is_empty() {
        true => Err("it is empty".into()),
        false => Ok(piece),
    }
}
