//! Where a picture comes from: a file, standard input, or a URL.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Limits, RgbImage, decode};
use crate::error::{Error, Result};

/// A picture that the user named on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    File(PathBuf),
    /// Standard input, `-`.
    Stdin,
    /// `http://` or `https://`.
    Url(String),
}

impl ImageSource {
    /// `-`, a URL, or the path of a file.
    pub fn parse(text: &str) -> Result<Self> {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        match scheme.as_deref() {
            _ if text.is_empty() => Err(Error::usage("no image was named: give a file, a URL, or - for standard input")),
            _ if text == "-" => Ok(Self::Stdin),
            Some("http" | "https") => Ok(Self::Url(text.to_owned())),
            Some("file") => Err(Error::usage(format!("image {text}: give the path of a file without file://"))),
            Some(scheme) if !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) => {
                Err(Error::usage(format!("image {text}: only http:// and https:// are fetched, not {scheme}://")))
            }
            _ => Ok(Self::File(text.into())),
        }
    }

    /// What to call it in messages: without the query and the user information of a URL, which may be secret.
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Stdin => "on standard input".to_owned(),
            Self::Url(url) => {
                let public = url.split(['?', '#']).next().unwrap_or_default();
                let (scheme, rest) = public.split_once("://").unwrap_or(("", public));
                let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let host = host.rsplit('@').next().unwrap_or_default();
                format!("{scheme}://{host}{path}")
            }
        }
    }

    /// Its bytes and its name. Reading stops behind [`Limits::max_bytes`] with an error, however much there would have been.
    ///
    /// A URL is fetched within 30 seconds over at most 3 redirects, from any address, private ones included: it was typed by the one
    /// who runs this program. **A server must not hand on its clients' URLs to this function.**
    pub fn read(&self, limits: &Limits) -> Result<(Vec<u8>, String)> {
        let name = self.name();
        let bytes = match self {
            Self::File(path) => read_file(path, &name, limits)?,
            Self::Stdin => read_capped(std::io::stdin().lock(), limits).map_err(|e| Error::image(&name, e))?,
            Self::Url(url) => fetch(url, limits).map_err(|e| Error::image(&name, e))?,
        };
        Ok((bytes, name))
    }

    /// Reads and decodes it.
    pub fn load(&self, limits: &Limits) -> Result<RgbImage> {
        let (bytes, name) = self.read(limits)?;
        decode(&bytes, &name, limits)
    }
}

fn read_file(path: &Path, name: &str, limits: &Limits) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let metadata = file.metadata().map_err(|e| Error::io(path, e))?;
    if metadata.is_dir() {
        return Err(Error::image(name, "is a folder: name a file in it"));
    }
    read_capped(file, limits).map_err(|e| Error::image(name, e))
}

/// All of `reader`, or an error as soon as there is one byte too many.
fn read_capped(reader: impl Read, limits: &Limits) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    reader.take(limits.max_bytes as u64 + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    limits.check_bytes(bytes.len())?;
    Ok(bytes)
}

#[cfg(feature = "hub")]
fn fetch(url: &str, limits: &Limits) -> Result<Vec<u8>, String> {
    const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);
    const MAX_REDIRECTS: u32 = 3;
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .max_redirects(MAX_REDIRECTS)
        .user_agent(concat!("llava-engine/", env!("CARGO_PKG_VERSION")));
    let agent: ureq::Agent = config.build().into();
    let response = agent.get(url).call().map_err(|e| match e {
        ureq::Error::StatusCode(code) => format!("cannot be fetched: the server answered with status {code}"),
        ureq::Error::Timeout(_) => format!("cannot be fetched: no complete answer in {} seconds", TIMEOUT.as_secs()),
        ureq::Error::TooManyRedirects => format!("cannot be fetched: more than {MAX_REDIRECTS} redirects"),
        e => format!("cannot be fetched: {e}"),
    })?;
    let mut body = response.into_body();
    if let Some(length) = body.content_length() {
        limits.check_bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
    }
    read_capped(body.as_reader(), limits)
}

#[cfg(not(feature = "hub"))]
fn fetch(_url: &str, _limits: &Limits) -> Result<Vec<u8>, String> {
    Err("cannot be fetched: this build has no network (feature `hub`); download it and give the file".to_owned())
}
