//! What each id adds to a text, worked out once at load, so that decoding is concatenation.

use std::collections::HashMap;

/// How a vocabulary spells bytes and spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// U+2581 is a space, `<0x41>` a byte; one space at the very start is dropped where encoding puts one there.
    SentencePiece {
        /// Whether to drop it.
        strip_first_space: bool,
    },
    /// GPT-2's: each character is a byte.
    ByteLevel,
}

/// The bytes of every id.
pub(super) struct Spellings {
    pub(super) spelling: Spelling,
    /// `None` for special tokens and for ids that the vocabulary skips: they leave no trace in a text.
    bytes: Vec<Option<Box<[u8]>>>,
}

impl Spellings {
    /// An empty table for ids below `n_ids`.
    pub(super) fn new(spelling: Spelling, n_ids: usize) -> Self {
        Self { spelling, bytes: vec![None; n_ids] }
    }

    /// Sets what each of `pieces` decodes to.
    pub(super) fn fill<'a>(&mut self, pieces: impl Iterator<Item = (u32, &'a str)>) {
        let table = byte_table();
        for (id, piece) in pieces {
            if let Some(slot) = self.bytes.get_mut(id as usize) {
                *slot = Some(match self.spelling {
                    Spelling::SentencePiece { .. } => match byte_piece(piece) {
                        Some(byte) => Box::new([byte]),
                        None => piece.replace('\u{2581}', " ").into_bytes().into_boxed_slice(),
                    },
                    // A piece with a character outside the table is an added token, which spells itself.
                    Spelling::ByteLevel => {
                        let bytes: Option<Vec<u8>> = piece.chars().map(|c| table.get(&c).copied()).collect();
                        bytes.unwrap_or_else(|| piece.as_bytes().to_vec()).into_boxed_slice()
                    }
                });
            }
        }
    }

    /// Makes an id leave no trace.
    pub(super) fn silence(&mut self, id: u32) {
        if let Some(slot) = self.bytes.get_mut(id as usize) {
            *slot = None;
        }
    }

    /// The bytes that an id adds to a text: none for special tokens and for ids outside the vocabulary.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).and_then(Option::as_deref).unwrap_or_default()
    }
}

/// The byte that a piece like `<0x0A>` stands for.
fn byte_piece(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// GPT-2's characters for the 256 bytes: the printable ones stand for themselves, the others for U+0100 onwards.
fn byte_table() -> HashMap<char, u8> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (own, shifted): (Vec<u8>, Vec<u8>) = (0..=255).partition(printable);
    let own = own.into_iter().map(|b| (char::from(b), b));
    let shifted = ('\u{100}'..).zip(shifted);
    own.chain(shifted).collect()
}
