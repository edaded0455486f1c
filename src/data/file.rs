//! Files of rows, which may be larger than memory: looked through once, row by row, and read again where a row is asked for.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Fault, Row, RowError, Written, checked};
use crate::error::{Error, Result};

/// A file of rows that is open. Of each row it knows the place, and nothing else is in memory.
#[derive(Debug)]
pub struct RowFile {
    path: PathBuf,
    image_folder: PathBuf,
    file: File,
    spans: Vec<Span>,
    sha256: [u8; 32],
}

/// Where a row stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    /// Its first byte.
    offset: u64,
    n_bytes: u32,
    /// The line of its first byte, counted from 1.
    line: u32,
}

/// Bytes that are read at once.
const CHUNK: usize = 1 << 16;

impl RowFile {
    /// Looks through a file; the pictures of its rows are in `image_folder`.
    ///
    /// # Errors
    /// If it cannot be read, or is neither a JSON array of objects nor one row a line; the message has row and line. What is wrong within
    /// a row is said when it is read.
    pub fn open(path: &Path, image_folder: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let (mut scan, mut hasher) = (Scan::default(), Sha256::new());
        let mut reader = &file;
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = reader.read(&mut chunk).map_err(|e| Error::io(path, e))?;
            if n == 0 {
                break;
            }
            hasher.update(&chunk[..n]);
            for &byte in &chunk[..n] {
                scan.step(byte).map_err(|problem| Error::file(path, problem))?;
            }
        }
        let spans = scan.finish().map_err(|problem| Error::file(path, problem))?;
        if spans.is_empty() {
            return Err(Error::file(path, "there are no rows"));
        }
        Ok(Self { path: path.to_owned(), image_folder: image_folder.to_owned(), file, spans, sha256: hasher.finalize().into() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of its bytes.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// How many rows it has.
    pub fn n_rows(&self) -> usize {
        self.spans.len()
    }

    /// The row at `index`, counted from 0. Whether its pictures exist is not looked at: see [`Row::check_images`].
    ///
    /// # Errors
    /// If it is not a row of a conversation; the message has its number and its line.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, index: usize) -> Result<Row, RowError> {
        let (span, number) = (self.spans[index], index + 1);
        let fail = |fault, error| RowError { fault, number, error };
        let mut bytes = vec![0; span.n_bytes as usize];
        self.file.read_exact_at(&mut bytes, span.offset).map_err(|e| fail(Fault::Json, Error::io(&self.path, e)))?;
        let written: Written = serde_json::from_slice(&bytes).map_err(|e| {
            let message = e.to_string();
            let words = message.split(" at line ").next().unwrap_or(&message);
            let kind = if e.is_data() { "" } else { "invalid JSON: " };
            let line = span.line as usize + e.line().saturating_sub(1);
            fail(Fault::Json, Error::file(&self.path, format!("row {number}, line {line}: {kind}{words}")))
        })?;
        checked(&self.path, &self.image_folder, number, written)
    }
}

/// Finds rows among bytes that come one by one.
#[derive(Default)]
struct Scan {
    state: State,
    spans: Vec<Span>,
    /// Bytes and line breaks so far.
    offset: u64,
    n_breaks: u32,
    /// Of the row at hand, which begins here.
    start: u64,
    line: u32,
    /// Brackets that are open in it.
    depth: usize,
    in_string: bool,
    escaped: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    /// Before anything.
    #[default]
    Start,
    /// In an array, before a row or the end.
    First,
    /// In an array, within a row.
    Row,
    /// In an array, behind a row.
    Behind,
    /// In an array, behind a comma.
    Next,
    /// Behind the array.
    End,
    /// In lines, before a row.
    LineStart,
    /// In lines, within one.
    Line,
}

impl Scan {
    /// Takes the next byte.
    fn step(&mut self, byte: u8) -> Result<(), String> {
        let at = self.offset;
        self.offset += 1;
        self.n_breaks += u32::from(byte == b'\n');
        match self.state {
            State::Row => self.within_row(byte)?,
            State::Line if byte == b'\n' => {
                self.row_ends(at)?;
                self.state = State::LineStart;
            }
            State::Line => {}
            // The mark of UTF-8 that some editors put first.
            State::Start if at < 3 && byte == [0xef, 0xbb, 0xbf][at as usize] => {}
            _ if byte.is_ascii_whitespace() => {}
            State::Start if byte == b'[' => self.state = State::First,
            State::Start if byte != b'{' => {
                return Err(format!("line {}: neither a JSON array of rows nor one row a line", self.n_breaks + 1));
            }
            State::Start | State::LineStart => self.row_begins(at, State::Line),
            State::First | State::Next if byte == b'{' => {
                self.row_begins(at, State::Row);
                self.depth = 1;
            }
            State::First | State::Behind if byte == b']' => self.state = State::End,
            State::Behind if byte == b',' => self.state = State::Next,
            State::First | State::Next => return Err(format!("{}: no row of the form {{\"conversations\": ...}}", self.place())),
            State::Behind => return Err(format!("{}: a comma is missing before it", self.place())),
            State::End => return Err(format!("line {}: there is more behind the end of the array", self.n_breaks + 1)),
        }
        Ok(())
    }

    fn within_row(&mut self, byte: u8) -> Result<(), String> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return Ok(());
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        if self.depth == 0 {
            self.row_ends(self.offset)?;
            self.state = State::Behind;
        }
        Ok(())
    }

    fn row_begins(&mut self, at: u64, state: State) {
        (self.start, self.line, self.state) = (at, self.n_breaks + 1, state);
    }

    fn row_ends(&mut self, end: u64) -> Result<(), String> {
        let n_bytes = u32::try_from(end - self.start).map_err(|_| format!("{}: it has more than 4 GiB", self.place()))?;
        self.spans.push(Span { offset: self.start, n_bytes, line: self.line });
        Ok(())
    }

    /// Where the row stands that is at hand, or comes next.
    fn place(&self) -> String {
        format!("row {}, line {}", self.spans.len() + 1, self.n_breaks + 1)
    }

    /// The rows, once all bytes were taken.
    fn finish(mut self) -> Result<Vec<Span>, String> {
        match self.state {
            State::Line => self.row_ends(self.offset)?,
            State::Start | State::End | State::LineStart => {}
            State::Row => {
                return Err(format!("row {}, line {}: invalid JSON: the file ends within it", self.spans.len() + 1, self.line));
            }
            State::First | State::Behind | State::Next => {
                return Err(format!("line {}: invalid JSON: the file ends before the array does", self.n_breaks + 1));
            }
        }
        Ok(self.spans)
    }
}
