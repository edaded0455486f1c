//! Finds a model by its name on the Hugging Face hub: in the local cache, where every HF program keeps what it fetched, or else on
//! the hub itself (feature `hub`).
//!
//! The environment variables are those of `huggingface_hub`: `HF_HUB_CACHE` (formerly `HUGGINGFACE_HUB_CACHE`), `HF_HOME`,
//! `XDG_CACHE_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`. What the endpoint answers is trusted as far as the
//! layout of the cache goes; the files it sends are parsed as any others.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use super::files;
use crate::error::{Error, Result};

/// The folder that `model` means: a path if it exists, or else `org/name`, or `org/name@revision`, on the hub.
///
/// # Errors
/// [`Error::File`] if it is neither, or is not in the cache and cannot be fetched; it says why and what to do.
pub fn resolve(model: &str) -> Result<PathBuf> {
    if Path::new(model).exists() {
        return Ok(PathBuf::from(model));
    }
    let Some(id) = Id::parse(model) else {
        return Err(Error::file(model, "no such folder, and not a name on the hub (org/name, or org/name@revision)"));
    };
    let hub = Hub::from_env()?;
    match hub.cached(&id) {
        Some(dir) => Ok(dir),
        None => hub.fetch(&id),
    }
}

/// The folder of `model` in the local cache; `None` if it is not there in full, or if `model` cannot be the name of a model.
///
/// # Errors
/// [`Error::Usage`] if the environment does not tell where the cache is.
pub fn cached(model: &str) -> Result<Option<PathBuf>> {
    let Some(id) = Id::parse(model) else { return Ok(None) };
    Ok(Hub::from_env()?.cached(&id))
}

/// Name of a model on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id {
    /// `org/name`
    repo: String,
    revision: String,
}

impl Id {
    /// Reads `org/name` or `org/name@revision`. `None` if it is anything else: both become parts of a path and of an address.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let is_name = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty() && name.len() <= 96 && name.chars().all(plain) && !name.starts_with(['.', '-']) && !name.contains("..")
        };
        let (org, name) = repo.split_once('/')?;
        let valid = is_name(org) && is_name(name) && revision.split('/').all(is_name);
        valid.then(|| Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }
}

/// Where models come from.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Folder of the `models--org--name` folders.
    pub cache: PathBuf,
    /// Address of the hub.
    pub endpoint: String,
    /// Sent with each request, for models that are not public.
    pub token: Option<String>,
    /// Whether nothing may be fetched.
    pub offline: bool,
}

impl Hub {
    /// The hub that the environment describes.
    ///
    /// # Errors
    /// [`Error::Usage`] if it does not tell where the cache is: not even `HOME` is set.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| env::var(name).ok())
    }

    /// The same, with `var` in place of the environment.
    ///
    /// # Errors
    /// As [`Hub::from_env`].
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let path = |name: &str| var(name).map(PathBuf::from);
        let home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(path("HOME").or_else(|| path("USERPROFILE"))?.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or_else(|| Error::usage("cannot tell where models are kept: set HF_HOME"))?;
        let token_path = path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        let saved = || fs::read_to_string(token_path?).ok();
        Ok(Self {
            // hf-hub makes links relative to it, which only works out between absolute paths.
            cache: std::path::absolute(&cache).map_err(|e| Error::io(&cache, e))?,
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()).trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").or_else(saved).map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: var("HF_HUB_OFFLINE").is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")),
        })
    }

    /// The snapshot of `id` in the cache, if all its files are there.
    pub fn cached(&self, id: &Id) -> Option<PathBuf> {
        let repo = self.repo_dir(id);
        let commit = fs::read_to_string(repo.join("refs").join(&id.revision)).unwrap_or_else(|_| id.revision.clone());
        let commit = commit.trim();
        let plain = !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric());
        Some(repo.join("snapshots").join(commit)).filter(|dir| plain && is_complete(dir))
    }

    fn repo_dir(&self, id: &Id) -> PathBuf {
        self.cache.join(format!("models--{}", id.repo.replace('/', "--")))
    }

    /// Fetches the files of `id` that a checkpoint consists of and returns their folder. What is in the cache already stays, and a
    /// file that was cut short is continued.
    ///
    /// # Errors
    /// [`Error::File`] if that fails or is not allowed.
    #[cfg(feature = "hub")]
    pub fn fetch(&self, id: &Id) -> Result<PathBuf> {
        use hf_hub::api::sync::{ApiBuilder, ApiError};
        use hf_hub::{Cache, Repo, RepoType};

        if self.offline {
            return Err(self.absent(id, "HF_HUB_OFFLINE is set"));
        }
        let failed = |what: &str, e: ApiError| self.absent(id, &format!("{what} failed: {e}"));
        let cache = Cache::new(self.cache.clone());
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_retries(3)
            .with_user_agent("llava-engine", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| failed("setting up the connection", e))?;
        let repo = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.clone());
        let remote = api.repo(repo.clone());
        let listing = remote.info().map_err(|e| failed(&format!("asking {} for its files", self.endpoint), e))?;
        let names: Vec<String> = listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        let wanted = wanted(&names);
        if !wanted.contains(&"config.json") {
            return Err(self.absent(id, "the hub has no config.json for it: not a checkpoint"));
        }
        let local = cache.repo(repo);
        let mut dir = None;
        for name in wanted {
            let path = match local.get(name) {
                Some(path) => path,
                None => remote.download_with_progress(name, Bar::new()).map_err(|e| failed(&format!("fetching {name}"), e))?,
            };
            dir = path.parent().map(Path::to_owned);
        }
        dir.filter(|dir| is_complete(dir)).ok_or_else(|| self.absent(id, "the hub has no weights for it that could be read"))
    }

    /// Says that this build cannot fetch.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "hub"))]
    pub fn fetch(&self, id: &Id) -> Result<PathBuf> {
        Err(self.absent(id, "this build cannot fetch (feature `hub` is off)"))
    }

    /// The error that `id` is not there: which file, where it was looked for, and how to fetch it.
    fn absent(&self, id: &Id, why: &str) -> Error {
        let dir = self.repo_dir(id);
        let snapshot =
            dir.join("snapshots").join(fs::read_to_string(dir.join("refs").join(&id.revision)).unwrap_or_default().trim());
        let what = match files::weight_files(&snapshot) {
            _ if !snapshot.join("config.json").is_file() => "config.json is not in".to_owned(),
            Err(e) => format!("weights are incomplete ({e}) in"),
            Ok(_) => "weights are not in".to_owned(),
        };
        let Id { repo, revision } = id;
        let advice = format!("fetch it with `hf download {repo} --revision {revision}` (a private or gated model needs HF_TOKEN)");
        Error::file(repo, format!("its {what} {}, and {why}: {advice}", dir.display()))
    }
}

/// Whether a snapshot has a configuration and every weight file it speaks of.
fn is_complete(dir: &Path) -> bool {
    let weights = || matches!(files::weight_files(dir), Ok(Some(_))) || dir.join("mm_projector.bin").is_file();
    dir.join("config.json").is_file() && weights()
}

/// Of all files of a repository those that a checkpoint consists of: safetensors or else pickles, and the small files.
#[cfg(any(feature = "hub", test))]
fn wanted(names: &[String]) -> Vec<&str> {
    let plain = || names.iter().map(String::as_str).filter(|name| files::is_file_name(name));
    let weights = [("model", ".safetensors"), ("", ".safetensors"), ("pytorch_model", ".bin"), ("mm_projector", ".bin")]
        .into_iter()
        .map(|(stem, extension)| {
            let fits = |name: &&str| name.starts_with(stem) && name.ends_with(extension) && !name.starts_with("adapter_");
            plain().filter(fits).collect::<Vec<_>>()
        })
        .find(|found| !found.is_empty());
    // The configuration comes first: without it nothing else is worth fetching.
    let mut wanted: Vec<&str> =
        plain().filter(|n| n.ends_with(".json") || n.ends_with(".jinja") || *n == "tokenizer.model").collect();
    wanted.sort_by_key(|name| *name != "config.json");
    wanted.extend(weights.unwrap_or_default());
    wanted
}

/// Progress of one file on standard error; draws nothing where that is no terminal. hf-hub has one too, which cuts long names at a
/// byte and so can panic on a name that the hub chose.
#[cfg(feature = "hub")]
struct Bar(indicatif::ProgressBar);

#[cfg(feature = "hub")]
impl Bar {
    fn new() -> Self {
        Self(indicatif::ProgressBar::hidden())
    }
}

#[cfg(feature = "hub")]
impl hf_hub::api::Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        let style = indicatif::ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
        self.0 = indicatif::ProgressBar::new(size as u64).with_message(filename.to_owned());
        if let Ok(style) = style {
            self.0.set_style(style);
        }
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Hub {
        Hub::from_vars(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())).unwrap()
    }

    #[test]
    fn names_that_could_be_paths_are_refused() {
        for text in [
            "",
            "a",
            "a/",
            "/a",
            "a/b/c",
            "../b",
            "a/..",
            "a/.b",
            "a/b@",
            "a/b@../c",
            "a/b@/c",
            "a/b@c/../d",
            "a b/c",
            "a/b?c",
            "a/b#c",
            "-a/b",
        ] {
            assert_eq!(Id::parse(text), None, "{text}");
        }
        let id = Id::parse("llava-hf/llava-1.5-7b-hf@refs/pr/3").unwrap();
        assert_eq!((id.repo.as_str(), id.revision.as_str()), ("llava-hf/llava-1.5-7b-hf", "refs/pr/3"));
        assert_eq!(Id::parse("a/b").unwrap().revision, "main");
    }

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let cache = |vars| hub(vars).cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert_eq!(cache(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), Path::new("/new"));
        assert!(Hub::from_vars(|_| None).is_err());
        let set = hub(&[("HOME", "/h"), ("HF_TOKEN", " t\n"), ("HF_ENDPOINT", "http://e/"), ("HF_HUB_OFFLINE", "TRUE")]);
        assert_eq!((set.token.as_deref(), set.endpoint.as_str(), set.offline), (Some("t"), "http://e", true));
        assert!(!hub(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn a_snapshot_counts_once_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let hub = hub(&[("HF_HUB_CACHE", dir.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")]);
        let repo = dir.path().join("models--a--b");
        let snapshot = repo.join("snapshots/0123abcd");
        let (id, by_commit) = (Id::parse("a/b").unwrap(), Id::parse("a/b@0123abcd").unwrap());
        let error = hub.fetch(&id).unwrap_err().to_string();
        assert!(error.contains("config.json is not in") && error.contains("hf download a/b"), "{error}");
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(repo.join("refs/main"), "0123abcd").unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(hub.cached(&id), None);
        assert!(hub.fetch(&id).unwrap_err().to_string().contains("weights are not in"));
        fs::write(snapshot.join("model-00001-of-00002.safetensors"), "x").unwrap();
        assert_eq!(hub.cached(&id), None);
        assert!(hub.fetch(&id).unwrap_err().to_string().contains("shard 2 of 2"));
        fs::write(snapshot.join("model-00002-of-00002.safetensors"), "x").unwrap();
        assert_eq!(hub.cached(&id), Some(snapshot.clone()));
        assert_eq!(hub.cached(&by_commit), Some(snapshot));
        fs::write(repo.join("refs/main"), "../../..").unwrap();
        assert_eq!(hub.cached(&id), None);
    }

    #[test]
    fn only_the_files_of_a_checkpoint_are_wanted() {
        let wanted = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            wanted(&names).join(" ")
        };
        let small =
            ["README.md", "tokenizer.model", "config.json", "a/config.json", "../x.json", "chat_template.jinja", "tf_model.h5"];
        let with = |more: &[&'static str]| wanted(&[&small, more].concat());
        assert_eq!(
            with(&["model.safetensors", "pytorch_model.bin"]),
            "config.json tokenizer.model chat_template.jinja model.safetensors"
        );
        assert_eq!(
            with(&["pytorch_model-00001-of-00001.bin", "training_args.bin", "mm_projector.bin"]),
            "config.json tokenizer.model chat_template.jinja pytorch_model-00001-of-00001.bin"
        );
        assert_eq!(with(&["mm_projector.bin"]), "config.json tokenizer.model chat_template.jinja mm_projector.bin");
    }

    /// A hub on this machine that has two files and sends half of a file the first time it is asked for all of it.
    #[cfg(feature = "hub")]
    fn serve(files: Vec<(&'static str, Vec<u8>)>) -> (String, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
        use std::io::{BufRead, BufReader, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let log = requests.clone();
        std::thread::spawn(move || {
            let mut cut = false;
            for mut stream in listener.incoming().map(Result::unwrap) {
                let lines: Vec<String> =
                    BufReader::new(&stream).lines().map(Result::unwrap).take_while(|line| !line.is_empty()).collect();
                let header = |name: &str| lines.iter().find_map(|l| l.to_ascii_lowercase().strip_prefix(name).map(str::to_owned));
                let path = lines[0].split(' ').nth(1).unwrap();
                log.lock().unwrap().push(format!("{path} {}", header("authorization: ").unwrap_or_default()));
                let response = if path == "/api/models/a/b/revision/main" {
                    let names: Vec<_> = files.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
                    let body = serde_json::json!({"sha": "c0ffee", "siblings": names}).to_string();
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()).into_bytes()
                } else if let Some((name, data)) = files.iter().find(|(name, _)| path == format!("/a/b/resolve/main/{name}")) {
                    let range = header("range: bytes=").unwrap();
                    let (start, end) = range.split_once('-').unwrap();
                    let start: usize = start.parse().unwrap();
                    let end = end.parse().map_or(data.len(), |end: usize| end + 1);
                    let head = format!(
                        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\n\
                         ETag: \"{}\"\r\nX-Repo-Commit: c0ffee\r\nConnection: close\r\n\r\n",
                        end - start,
                        end - 1,
                        data.len(),
                        name.replace('.', "")
                    );
                    let sent = if end == data.len() && !cut && data.len() > 100 { start + (end - start) / 2 } else { end };
                    cut |= sent < end;
                    [head.as_bytes(), &data[start..sent]].concat()
                } else {
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
                };
                let _ = stream.write_all(&response);
            }
        });
        (endpoint, requests)
    }

    #[test]
    #[cfg(feature = "hub")]
    fn a_model_is_fetched_once_and_continued_where_it_was_cut() {
        let weights: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let (endpoint, requests) =
            serve(vec![("README.md", b"no".to_vec()), ("config.json", b"{}".to_vec()), ("model.safetensors", weights.clone())]);
        let dir = tempfile::tempdir().unwrap();
        let hub = hub(&[("HF_HUB_CACHE", dir.path().to_str().unwrap()), ("HF_ENDPOINT", &endpoint), ("HF_TOKEN", "secret")]);
        let id = Id::parse("a/b").unwrap();
        let fetched = hub.fetch(&id).unwrap();
        assert_eq!(fetched, dir.path().join("models--a--b/snapshots/c0ffee"));
        assert_eq!(fs::read(fetched.join("model.safetensors")).unwrap(), weights);
        assert_eq!(hub.cached(&id), Some(fetched.clone()));
        let n_requests = requests.lock().unwrap().len();
        assert!(requests.lock().unwrap().iter().all(|request| request.ends_with("bearer secret") && !request.contains("README")));
        hub.fetch(&id).unwrap();
        assert_eq!(requests.lock().unwrap().len(), n_requests + 1, "only the list of files is asked for again");
        let error = hub.fetch(&Id::parse("a/none").unwrap()).unwrap_err().to_string();
        assert!(error.contains("failed: ") && error.contains("404") && error.contains("hf download a/none"), "{error}");
    }
}
