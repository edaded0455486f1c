//! Rows of LLaVA's instruction data (`docs/Data.md` of haotian-liu/LLaVA): conversations about pictures.
//!
//! A file is a JSON array of rows, or one row a line (JSONL):
//!
//! ```json
//! {"id": "0001", "image": "0001.png", "conversations": [
//!   {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}
//! ```
//!
//! `image` is a path within a folder that is named beside the file; it may be a list of them, or missing, and then the row is text only.
//! An answer to nothing at the start is dropped, and a picture's mark is moved to the front of its turn, as LLaVA's own code does. Where
//! that goes on silently with another number of marks than pictures, or a mark in an answer, such a row is an error here. A row may begin with
//! `{"from": "system", "value": ...}`, which LLaVA's own code cannot read and other trainers can: its system prompt, in place of the
//! template's. An empty one is none.

mod file;

use std::fmt;
use std::path::{Path, PathBuf};

pub use file::RowFile;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::image::{ImageSource, Limits, RgbImage};

/// How a picture is marked in a text.
const IMAGE_MARK: &str = "<image>";

/// A conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The file it was read from.
    pub file: PathBuf,
    /// Its place there, counted from 1.
    pub number: usize,
    /// What the file calls it; empty if it has no name.
    pub id: String,
    /// Its pictures, in the order of their marks.
    pub images: Vec<PathBuf>,
    /// Its system prompt, which stands in place of the template's.
    pub system: Option<String>,
    /// What was asked and answered; at least one exchange.
    pub exchanges: Vec<Exchange>,
    /// Words of all turns, by which LLaVA's own code sorts rows by length.
    pub n_words: usize,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Without marks of pictures: these stand in front of it, wherever they were, and white space around it is gone then.
    pub question: String,
    /// Pictures of the question.
    pub n_images: usize,
    /// What was answered; it may be empty.
    pub answer: String,
}

/// What is wrong with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// It is no JSON, or not of the form that rows have.
    Json,
    /// It has no turns.
    Empty,
    /// A turn is of an unknown role, or out of turn.
    Roles,
    /// Nobody answers.
    NoAnswer,
    /// It has another number of marks than of pictures.
    Marks,
    /// A picture is not there.
    MissingImage,
    /// A picture cannot be decoded.
    BrokenImage,
    /// The template cannot hold it.
    Template,
    /// Its answers are empty, or lie behind the longest length.
    NothingToLearn,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Json,
        Self::Empty,
        Self::Roles,
        Self::NoAnswer,
        Self::Marks,
        Self::MissingImage,
        Self::BrokenImage,
        Self::Template,
        Self::NothingToLearn,
    ];

    /// What to call rows with it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "invalid JSON",
            Self::Empty => "empty conversations",
            Self::Roles => "role errors",
            Self::NoAnswer => "no answer",
            Self::Marks => "wrong count of <image>",
            Self::MissingImage => "missing images",
            Self::BrokenImage => "broken images",
            Self::Template => "not for the template",
            Self::NothingToLearn => "nothing to learn",
        }
    }
}

/// A row that cannot be used.
#[derive(Debug)]
pub struct RowError {
    /// What kind of fault.
    pub fault: Fault,
    /// The row's number in its file, counted from 1.
    pub number: usize,
    /// File, row and fault in words.
    pub error: Error,
}

impl Row {
    /// What is wrong with this row, with its place.
    pub fn error(&self, problem: impl fmt::Display) -> Error {
        let id = if self.id.is_empty() { String::new() } else { format!(" (id {})", self.id) };
        Error::file(&self.file, format!("row {}{id}: {problem}", self.number))
    }

    /// The same, as a fault of this kind.
    pub fn fault(&self, fault: Fault, problem: impl fmt::Display) -> RowError {
        RowError { fault, number: self.number, error: self.error(problem) }
    }

    /// Its pictures, decoded.
    ///
    /// # Errors
    /// If one cannot be read; row and picture are named.
    pub fn load_images(&self) -> Result<Vec<RgbImage>> {
        let load = |path: &PathBuf| ImageSource::File(path.clone()).load(&Limits::default());
        self.images.iter().map(|path| load(path).map_err(|e| self.error(e))).collect()
    }

    /// Checks that its pictures are there.
    ///
    /// # Errors
    /// [`Fault::MissingImage`] of the first that is not.
    pub fn check_images(&self) -> Result<(), RowError> {
        match self.images.iter().find(|image| !image.is_file()) {
            Some(image) => {
                let problem = format!("its picture {} is not there: is the image folder right?", image.display());
                Err(self.fault(Fault::MissingImage, problem))
            }
            None => Ok(()),
        }
    }
}

/// A row as it is written.
#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    id: Value,
    #[serde(default)]
    image: Option<Images>,
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Images {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

#[derive(Deserialize)]
struct Turn {
    from: String,
    value: String,
}

/// Reads a file to calibrate by; pictures are in `image_folder`. Of more than `max_rows` rows, as many are taken, evenly spread over the
/// file.
///
/// # Errors
/// If the file cannot be read or is not of rows; if a row that is taken is faulty, has an empty answer or a picture that is not there. The
/// message has the number of the row and its id.
pub fn read(file: &Path, image_folder: &Path, max_rows: usize) -> Result<Vec<Row>> {
    let rows = RowFile::open(file, image_folder)?;
    let n_rows = rows.n_rows();
    let n_taken = max_rows.min(n_rows);
    if n_taken == 0 {
        return Err(Error::file(file, "there are no rows"));
    }
    let taken = (0..n_rows).filter(|i| i * n_taken % n_rows < n_taken);
    let whole = |i: usize| {
        let row = rows.row(i).map_err(|e| e.error)?;
        if row.exchanges.iter().any(|e| e.answer.trim().is_empty()) {
            return Err(row.error("an answer is empty"));
        }
        row.check_images().map_err(|e| e.error)?;
        Ok(row)
    };
    taken.map(whole).collect()
}

/// White space to Python: `str.strip` and `str.split` take the separators of ASCII for it, which Unicode does not.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// A row as the rest of the program sees it, if it is a conversation.
fn checked(file: &Path, image_folder: &Path, number: usize, written: Written) -> Result<Row, RowError> {
    let id = match written.id {
        Value::String(id) => id,
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let images: Vec<PathBuf> = match written.image {
        None => Vec::new(),
        Some(Images::One(image)) => vec![image_folder.join(image)],
        Some(Images::Many(images)) => images.iter().map(|image| image_folder.join(image)).collect(),
    };
    let turns = written.conversations;
    let n_words = turns.iter().map(|t| t.value.split(is_space).filter(|word| !word.is_empty()).count()).sum();
    let (system, turns) = match &turns[..] {
        [first, rest @ ..] if first.from == "system" => (Some(first.value.clone()).filter(|words| !words.is_empty()), rest),
        turns => (None, turns),
    };
    let mut row = Row { file: file.to_owned(), number, id, images, system, exchanges: Vec::new(), n_words };
    if turns.is_empty() {
        return Err(row.fault(Fault::Empty, "it has no turns of `human` and `gpt`"));
    }
    if let Some(turn) = turns.iter().find(|t| t.from != "human" && t.from != "gpt") {
        let problem = match &*turn.from {
            "system" => "a turn is from `system` behind the first: one may stand in front of all others",
            _ => &format!(
                "a turn is from `{}`: turns are from `human` or `gpt`, and one in front of all may be from `system`",
                turn.from
            ),
        };
        return Err(row.fault(Fault::Roles, problem));
    }
    if !row.images.is_empty() && row.system.as_ref().is_some_and(|words| words.contains(IMAGE_MARK)) {
        let problem = format!("a mark {IMAGE_MARK} is in its system prompt: pictures belong to questions");
        return Err(row.fault(Fault::Marks, problem));
    }
    // As in LLaVA's own code, an answer to nothing is dropped.
    let turns = &turns[usize::from(turns[0].from == "gpt")..];
    if turns.iter().all(|t| t.from == "human") {
        return Err(row.fault(Fault::NoAnswer, "no turn of `gpt` answers one of `human`: there is nothing to learn"));
    }
    for pair in turns.chunks(2) {
        for (turn, from) in pair.iter().zip(["human", "gpt"]) {
            if turn.from != from {
                let problem = format!("a turn is from `{}` where `{from}` speaks: turns must alternate", turn.from);
                return Err(row.fault(Fault::Roles, problem));
            }
        }
        let [question, answer] = pair else { return Err(row.fault(Fault::Roles, "its last question has no answer")) };
        let n_images = question.value.matches(IMAGE_MARK).count();
        let question = match n_images {
            0 => question.value.clone(),
            _ => question.value.replace(IMAGE_MARK, "").trim_matches(is_space).to_owned(),
        };
        if !row.images.is_empty() && answer.value.contains(IMAGE_MARK) {
            let problem = format!("a mark {IMAGE_MARK} is in an answer: pictures belong to questions");
            return Err(row.fault(Fault::Marks, problem));
        }
        row.exchanges.push(Exchange { question, n_images, answer: answer.value.clone() });
    }
    let n_marks: usize = row.exchanges.iter().map(|e| e.n_images).sum();
    if n_marks != row.images.len() {
        let problem = format!("{} pictures, but its text has {n_marks} marks {IMAGE_MARK}", row.images.len());
        return Err(row.fault(Fault::Marks, problem));
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read_text(text: &str, max_rows: usize) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rows.json");
        fs::write(&file, text).unwrap();
        for image in ["a.png", "b.png"] {
            fs::write(dir.path().join(image), "").unwrap();
        }
        read(&file, dir.path(), max_rows)
    }

    const WITH_IMAGE: &str = r#"{"id": "x7", "image": "a.png", "conversations": [
        {"from": "human", "value": "What is <image> this?\n"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}], "types": ["list"]}"#;
    const TEXT_ONLY: &str = r#"{"id": 8, "conversations": [
        {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A cat."}]}"#;

    fn one_line(row: &str) -> String {
        row.split('\n').collect()
    }

    #[test]
    fn arrays_and_lines_are_read_alike() {
        let array = read_text(&format!("[{WITH_IMAGE}, {TEXT_ONLY}]"), 9).unwrap();
        let lines = read_text(&format!("{}\n\n{}\n", one_line(WITH_IMAGE), one_line(TEXT_ONLY)), 9).unwrap();
        assert_eq!((array.len(), lines.len()), (2, 2));
        for rows in [&array, &lines] {
            let said =
                |question: &str, n_images, answer: &str| Exchange { question: question.into(), n_images, answer: answer.into() };
            assert_eq!(rows[0].exchanges, [said("What is  this?", 1, "A cat."), said("Sure?", 0, "Yes.")]);
            assert_eq!(rows[1].exchanges, [said("Hi", 0, "A cat.")]);
            assert_eq!((rows[0].id.as_str(), rows[0].number), ("x7", 1));
            assert_eq!((rows[1].id.as_str(), rows[1].number), ("8", 2));
            assert!(rows[0].images[0].ends_with("a.png") && rows[0].images.len() == 1 && rows[1].images.is_empty());
        }
    }

    #[test]
    fn rows_are_taken_evenly() {
        let text = format!("[{}]", [TEXT_ONLY; 10].join(","));
        let numbers = |n| read_text(&text, n).unwrap().iter().map(|row| row.number).collect::<Vec<_>>();
        assert_eq!(numbers(1), [1]);
        assert_eq!(numbers(3), [1, 5, 8]);
        assert_eq!(numbers(10), (1..=10).collect::<Vec<_>>());
        assert_eq!(numbers(99).len(), 10);
    }

    #[test]
    fn errors_name_the_row() {
        let with = |from: &str, to: &str| {
            assert!(WITH_IMAGE.contains(from));
            WITH_IMAGE.replace(from, to)
        };
        for (row, expected) in [
            (with("a.png", "missing.png"), "row 2 (id x7): its picture"),
            (with("a.png", "missing.png"), "missing.png is not there"),
            (with("<image>", ""), "row 2 (id x7): 1 pictures, but its text has 0 marks"),
            (with(r#""a.png""#, r#"["a.png", "b.png"]"#), "2 pictures, but its text has 1"),
            (with("Yes.", " "), "row 2 (id x7): an answer is empty"),
            (with(r#"{"from": "human", "value": "Sure?"},"#, ""), "a turn is from `gpt` where `human` speaks"),
            (with(r#", {"from": "gpt", "value": "Yes."}"#, ""), "its last question has no answer"),
            (with(r#""from": "human", "value": "Sure?""#, r#""from": "gpt", "value": "Sure?""#), "a turn is from `gpt` where"),
            (with("conversations", "talk"), "row 2, line 4: missing field `conversations`"),
            (with(r#""A cat.""#, "7"), "row 2, line 3: invalid type"),
            (r#"{"id": 1, "conversations": []}"#.to_owned(), "row 2 (id 1): it has no turns"),
        ] {
            let error = read_text(&format!("[{TEXT_ONLY}, {row}]"), 9).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("rows.json"), "{error} lacks {expected}");
        }
        let error = read_text(&format!("{}\n{{", one_line(TEXT_ONLY)), 9).unwrap_err().to_string();
        assert!(error.contains("row 2"), "{error}");
        for nothing in ["", "[]"] {
            assert!(read_text(nothing, 9).unwrap_err().to_string().contains("there are no rows"));
        }
        assert!(read_text(&format!("[{TEXT_ONLY}] x"), 9).is_err());
    }
}
