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

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Result};

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
    /// What was asked and answered.
    pub exchanges: Vec<Exchange>,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Without marks of pictures: these stand in front of it, wherever they were.
    pub question: String,
    /// Pictures of the question.
    pub n_images: usize,
    /// What was answered; never empty.
    pub answer: String,
}

impl Row {
    /// What is wrong with this row, with its place.
    pub fn error(&self, problem: impl fmt::Display) -> Error {
        let id = if self.id.is_empty() { String::new() } else { format!(" (id {})", self.id) };
        Error::file(&self.file, format!("row {}{id}: {problem}", self.number))
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

/// Reads a file; pictures are in `image_folder`. Of more than `max_rows` rows, as many are taken, evenly spread over the file.
///
/// # Errors
/// If the file cannot be read or is not of such rows; if a row that is taken has turns that do not alternate, or a picture that is not
/// there. The message has the number of the row and its id.
pub fn read(file: &Path, image_folder: &Path, max_rows: usize) -> Result<Vec<Row>> {
    let text = fs::read_to_string(file).map_err(|e| Error::io(file, e))?;
    let written = parse(&text).map_err(|problem| Error::file(file, problem))?;
    let n_rows = written.len();
    let n_taken = max_rows.min(n_rows);
    if n_taken == 0 {
        return Err(Error::file(file, "there are no rows"));
    }
    let written = written.into_iter().enumerate().filter(|(i, _)| i * n_taken % n_rows < n_taken);
    written.map(|(i, written)| row(file, image_folder, i + 1, written)).collect()
}

/// The rows of an array or of lines; what is wrong with the first that is none.
fn parse(text: &str) -> Result<Vec<Written>, String> {
    if text.trim_start().starts_with('[') {
        let n_read = Cell::new(0);
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let rows = Rows(&n_read).deserialize(&mut deserializer).and_then(|rows| deserializer.end().map(|()| rows));
        return rows.map_err(|e| format!("row {}: {e}", n_read.get() + 1));
    }
    let lines = text.lines().filter(|line| !line.trim().is_empty()).enumerate();
    lines.map(|(i, line)| serde_json::from_str(line).map_err(|e| format!("row {}: {e}", i + 1))).collect()
}

/// An array of rows, which counts those that it has read, so that an error can say where it is.
struct Rows<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    type Value = Vec<Written>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = Vec<Written>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<Self::Value, A::Error> {
        let mut all = Vec::new();
        while let Some(row) = rows.next_element()? {
            all.push(row);
            self.0.set(all.len());
        }
        Ok(all)
    }
}

/// A row as the rest of the program sees it.
fn row(file: &Path, image_folder: &Path, number: usize, written: Written) -> Result<Row> {
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
    let mut row = Row { file: file.to_owned(), number, id, images, exchanges: Vec::new() };
    // As in LLaVA's own code, an answer to nothing is dropped.
    let turns = &written.conversations[usize::from(written.conversations.first().is_some_and(|t| t.from == "gpt"))..];
    for pair in turns.chunks(2) {
        let [question, answer] = pair else { return Err(row.error("its last question has no answer")) };
        for (turn, from) in [(question, "human"), (answer, "gpt")] {
            if turn.from != from {
                return Err(row.error(format!("a turn is from `{}` where `{from}` speaks: turns must alternate", turn.from)));
            }
        }
        if answer.value.trim().is_empty() {
            return Err(row.error("an answer is empty"));
        }
        row.exchanges.push(Exchange {
            question: question.value.replace(IMAGE_MARK, "").trim().to_owned(),
            n_images: question.value.matches(IMAGE_MARK).count(),
            answer: answer.value.clone(),
        });
    }
    let n_marks: usize = row.exchanges.iter().map(|e| e.n_images).sum();
    if row.exchanges.is_empty() {
        return Err(row.error("it has no turns"));
    }
    if n_marks != row.images.len() {
        return Err(row.error(format!("{} pictures, but its text has {n_marks} marks {IMAGE_MARK}", row.images.len())));
    }
    match row.images.iter().find(|image| !image.is_file()) {
        Some(image) => Err(row.error(format!("its picture {} is not there: is the image folder right?", image.display()))),
        None => Ok(row),
    }
}

#[cfg(test)]
mod tests {
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
            (with(r#"{"from": "human", "value": "Sure?"},"#, ""), "its last question has no answer"),
            (with(r#""from": "human", "value": "Sure?""#, r#""from": "gpt", "value": "Sure?""#), "a turn is from `gpt` where"),
            (with("conversations", "talk"), "row 2: missing field `conversations`"),
            (with(r#""A cat.""#, "7"), "row 2: invalid type"),
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
