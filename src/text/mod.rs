//! Words to ids and back: tokenizers, conversation templates, prompts, streaming decode.
//!
//! A [`Conversation`] or a [`ChatTemplate`] makes a [`Prompt`], a list of parts in which the text of users is kept apart from
//! special tokens and images; [`Tokenizer::tokenize_prompt`] makes ids of it in the [`Style`] of one of the two references;
//! [`StreamDecoder`] turns the answer's ids back to text as they come, and [`StopMatcher`] ends it.

mod added;
mod chat_template;
mod conversation;
mod decode;
pub mod export;
mod gguf;
mod open;
mod prompt;
mod sentencepiece;
mod stream;
mod tokenizer;

pub use added::{IMAGE_MARK, Reading};
pub use chat_template::{ChatTemplate, Content, Message};
pub use conversation::{Conversation, Supervised, Template, pick_by_hints};
pub use prompt::{Prompt, PromptPart};
pub use sentencepiece::{PieceKind, SentencePiece, VocabPiece};
pub use stream::{StopMatcher, StreamDecoder};
pub use tokenizer::{Piece, PlacedId, Style, Tokenizer};
