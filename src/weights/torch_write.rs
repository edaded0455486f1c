//! Writes what `torch.load` reads, for the one file that another program takes in no other format: a zip archive of a pickle and of a
//! storage for each tensor ([`torch_zip`](super::torch_zip) reads it). `torch.load(..., weights_only=True)` takes it as well.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

use super::write::partial;

/// Writes a dictionary of `tensors`, which are f32, as the file `path`.
///
/// # Errors
/// [`Error::Io`] if it cannot be written.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let temporary = partial(path);
    let file = File::create(&temporary).map_err(|e| Error::io(&temporary, e))?;
    let mut archive = ZipWriter::new(BufWriter::new(file));
    let done = archive_of(&mut archive, tensors).and_then(|()| archive.finish()?.into_inner()?.sync_all());
    done.and_then(|()| fs::rename(&temporary, path)).map_err(|e| {
        // What is left of it is of no use; the first error is the one to be told.
        let _ = fs::remove_file(&temporary);
        Error::io(path, e)
    })
}

fn archive_of(archive: &mut ZipWriter<BufWriter<File>>, tensors: &[(String, Tensor)]) -> std::io::Result<()> {
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(true);
    let mut entry = |name: &str, bytes: &[u8]| {
        archive.start_file(format!("archive/{name}"), options)?;
        archive.write_all(bytes)
    };
    entry("data.pkl", &pickle(tensors))?;
    entry("byteorder", b"little")?;
    for (i, (_, tensor)) in tensors.iter().enumerate() {
        entry(&format!("data/{i}"), tensor.as_bytes())?;
    }
    entry("version", b"3\n")
}

/// {name: torch._utils._rebuild_tensor_v2(storage i, 0, shape, strides, False, OrderedDict())}, in protocol 2.
fn pickle(tensors: &[(String, Tensor)]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        assert_eq!(tensor.dtype(), DType::F32, "{name}");
        let text = |out: &mut Vec<u8>, text: &str| {
            out.push(b'X');
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.as_bytes());
        };
        // Whole numbers of any size: a count of bytes, then as many. No tensor has 2⁶³ elements, so that the sign is right.
        let int = |out: &mut Vec<u8>, n: usize| {
            out.extend([0x8a, 8]);
            out.extend((n as u64).to_le_bytes());
        };
        let tuple = |out: &mut Vec<u8>, numbers: &[usize]| {
            out.push(b'(');
            numbers.iter().for_each(|&n| int(out, n));
            out.push(b't');
        };
        let strides: Vec<usize> = (1..=tensor.shape().len()).map(|d| tensor.shape()[d..].iter().product()).collect();
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        int(&mut out, tensor.len());
        out.extend(b"tQ");
        int(&mut out, 0);
        tuple(&mut out, tensor.shape());
        tuple(&mut out, &strides);
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}
