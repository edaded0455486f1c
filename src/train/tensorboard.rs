//! Event files for TensorBoard.
//!
//! A file is a row of records, each `length: u64, crc(length): u32, data, crc(data): u32`, little-endian (TFRecord); each record is an
//! `Event` in the wire format of protocol buffers (`tensorflow/core/util/event.proto`, `framework/summary.proto`).

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// A file of events that is being written.
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Begins a new file; TensorBoard knows it by its name, which must contain `tfevents`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(path: &Path, time: f64) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let mut events = Self { file: File::create(path).map_err(io)? };
        let mut event = field_f64(1, time);
        event.extend(field_bytes(3, b"brain.Event:2"));
        events.write(&event).map_err(io)?;
        Ok(events)
    }

    /// Adds numbers of a step, each with its name; `time` in seconds since 1970.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn scalars(&mut self, step: usize, time: f64, values: &[(&str, f64)]) -> io::Result<()> {
        let value = |(tag, value): &(&str, f64)| {
            let mut bytes = field_bytes(1, tag.as_bytes());
            bytes.push(2 << 3 | FIXED32);
            bytes.extend((*value as f32).to_le_bytes());
            field_bytes(1, &bytes)
        };
        let mut event = field_f64(1, time);
        event.push(2 << 3 | VARINT);
        event.extend(varint(step as u64));
        event.extend(field_bytes(5, &values.iter().flat_map(value).collect::<Vec<_>>()));
        self.write(&event)
    }

    fn write(&mut self, event: &[u8]) -> io::Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked_crc(&length), event, &masked_crc(event)].concat();
        self.file.write_all(&record)
    }
}

// Wire types.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

fn varint(mut n: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}

fn field_f64(number: u8, value: f64) -> Vec<u8> {
    [&[number << 3 | FIXED64][..], &value.to_le_bytes()].concat()
}

fn field_bytes(number: u8, value: &[u8]) -> Vec<u8> {
    [&[number << 3 | BYTES][..], &varint(value.len() as u64), value].concat()
}

/// CRC-32C, turned and shifted as TFRecord has it, so that a CRC of data that holds CRCs is none of these.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that the `tensorboard` package (2.21) writes of the same events.
    #[test]
    fn files_are_those_of_tensorboard_itself() {
        let expected = "1800000000000000a37f4b220900000000004a93401a0d627261696e2e4576656e743a3265b8d3fb33000000000000000ca7205609000000\
                        00004d934010ac022a250a110a0a747261696e2f6c6f737315000020400a100a096576616c2f6c6f737315000000be2e37c240";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.out.tfevents");
        let mut events = EventFile::create(&path, 1234.5).unwrap();
        events.scalars(300, 1235.25, &[("train/loss", 2.5), ("eval/loss", -0.125)]).unwrap();
        let written: String = std::fs::read(&path).unwrap().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(written, expected);
    }
}
