//! The one error type. A message says what went wrong, where, and what to do; a variant says whose fault it was, from which the
//! command line takes its exit code and the C ABI its status.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in which tensor, file or argument, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument, flag or request that can never work; the message names it and what is accepted.
    #[error("{0}")]
    Usage(String),
    /// An op was handed tensors that do not fit together.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Shape {
        /// The op that refused.
        op: &'static str,
        /// Which tensor or dimension.
        what: String,
        /// What the op needs.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file whose content is not what it should be: malformed, truncated, hostile, or of another kind.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A tensor that is missing from a checkpoint or does not fit its configuration.
    #[error("{}: tensor `{name}`: {problem}", path.display())]
    Tensor {
        /// Its name in the file.
        name: String,
        /// The file or folder it was looked for in.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An image that was refused or cannot be decoded.
    #[error("image {name}: {problem}")]
    Image {
        /// File name, or where the bytes came from.
        name: String,
        /// Why it was refused.
        problem: String,
    },
    /// The prompt, with its images, does not fit the context of the model.
    #[error(
        "the prompt has {prompt_tokens} tokens ({image_tokens} of them from images) but the model's context is {context_tokens}: \
         shorten the prompt or use fewer images"
    )]
    Context {
        /// Tokens of the prompt, image positions expanded.
        prompt_tokens: usize,
        /// How many of those come from images.
        image_tokens: usize,
        /// What the model can hold.
        context_tokens: usize,
    },
    /// A conversation or chat template that does not parse, render, or end.
    #[error("template {name}: {problem}")]
    Template {
        /// Template name or file.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A kernel that could not be launched or went wrong, or a device that refused a request.
    #[error("device: {op}: {problem}")]
    Device {
        /// The kernel or request.
        op: String,
        /// What the device said, or what is wrong with the launch.
        problem: String,
    },
    /// What a check of ops, or of gradients, has found.
    #[error("{place}: {problem}")]
    Check {
        /// The op, and the part of the model that it stands in; or the step of training.
        place: String,
        /// What is wrong with its results.
        problem: String,
    },
    /// Memory that a device does not have.
    #[error(
        "out of device memory for {purpose}: {} more are needed at once, {} of {} are free: {advice}",
        size(*needed), size(*free), size(*total)
    )]
    Memory {
        /// What it was for.
        purpose: String,
        /// Bytes that were asked for.
        needed: usize,
        /// Bytes that are free.
        free: usize,
        /// Bytes that the device has.
        total: usize,
        /// What to do.
        advice: String,
    },
    /// Ended on request before it was done.
    #[error("cancelled")]
    Cancelled,
    /// Something that this build or this machine does not have.
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    /// An argument that can never work.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// A malformed or unsuitable file or folder.
    pub fn file(path: impl AsRef<Path>, problem: impl fmt::Display) -> Self {
        Self::File { path: path.as_ref().to_owned(), problem: problem.to_string() }
    }

    /// A file that the system would not let us read or write.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// A missing or ill-shaped tensor of a checkpoint.
    pub fn tensor(name: impl Into<String>, path: impl AsRef<Path>, problem: impl fmt::Display) -> Self {
        Self::Tensor { name: name.into(), path: path.as_ref().to_owned(), problem: problem.to_string() }
    }

    /// An image that was refused.
    pub fn image(name: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self::Image { name: name.into(), problem: problem.to_string() }
    }

    /// A template that failed.
    pub fn template(name: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self::Template { name: name.into(), problem: problem.to_string() }
    }

    /// A kernel or request that a device refused.
    pub fn device(op: impl Into<String>, problem: impl fmt::Display) -> Self {
        Self::Device { op: op.into(), problem: problem.to_string() }
    }

    /// Something wrong with the results of an op.
    pub fn check(op: &str, problem: impl fmt::Display) -> Self {
        Self::Check { place: op.to_owned(), problem: problem.to_string() }
    }

    /// If this was found by a check of ops: the part of the model that the op stands in, which only the model knows. Other errors of ops
    /// may be those of launches that were queued before, in another part.
    pub fn within(mut self, part: impl fmt::Display) -> Self {
        if let Self::Check { place, .. } = &mut self {
            *place = format!("{part}, {place}");
        }
        self
    }

    /// A device that has not as much memory as was asked for.
    pub fn memory(needed: usize, free: usize, total: usize) -> Self {
        let advice = "give the device less to do at once, or run with --device cpu".to_owned();
        Self::Memory { purpose: "the work at hand".to_owned(), needed, free, total, advice }
    }

    /// If this is a lack of memory: what it was for, and what to do, which only the caller knows.
    pub fn lacking_for(mut self, what: impl fmt::Display, what_to_do: impl fmt::Display) -> Self {
        if let Self::Memory { purpose, advice, .. } = &mut self {
            (*purpose, *advice) = (what.to_string(), what_to_do.to_string());
        }
        self
    }

    /// An operand of `op` that does not fit.
    pub fn shape(op: &'static str, what: impl Into<String>, expected: impl fmt::Debug, got: impl fmt::Debug) -> Self {
        Self::Shape { op, what: what.into(), expected: format!("{expected:?}"), got: format!("{got:?}") }
    }

    /// Exit code of the command line: 2 for wrong usage, 1 for a run that failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            _ => 1,
        }
    }
}

/// A number of bytes for people.
pub fn size(bytes: usize) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.iter().find(|(shift, _)| bytes >> shift > 0);
    unit.map_or_else(|| format!("{bytes} bytes"), |(shift, name)| format!("{:.1} {name}", bytes as f64 / f64::from(1 << shift)))
}
