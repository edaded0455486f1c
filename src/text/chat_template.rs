//! `chat_template`s of Hugging Face checkpoints: Jinja, rendered by minijinja within limits.
//!
//! A template is somebody else's program. It gets no files and no clock but `strftime_now`, runs on a fixed budget of steps and
//! bytes, and never sees what a user said: each text stands in the messages as a short placeholder (with its own white space around
//! it, so that `strip` works), and is put in place afterwards. So whatever `</s>`, `<image>` or Jinja the user typed stays text, and
//! every special token and image mark in the output is the template's own.
//!
//! The price: a template that looks inside a text (its length, its first word, `upper`, `'x' in content`) sees the placeholder. One
//! that cuts a placeholder to pieces is an error, not a wrong prompt.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::added::IMAGE_MARK;
use super::open::read;
use super::prompt::{Prompt, marks};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Steps of a rendering; each also pays for 64 bytes. A conversation of 100 turns takes a few thousand.
const FUEL: u64 = 100_000;
/// Nesting of macros and of includes.
const MAX_RECURSION: usize = 100;
/// The longest published template has 30 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Longest output, user texts not counted.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// Longest value that `tojson` writes: tools, of which a LLaVA has none.
const MAX_TOJSON_BYTES: usize = 1 << 17;
/// Around the number of a text in its placeholder: private-use characters, which have no case and are no white space.
const OPEN: char = '\u{f8f0}';
const CLOSE: char = '\u{f8f1}';

/// What a message holds, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An image.
    Image,
    /// Words of the speaker.
    Text(String),
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`; templates decide what they know.
    pub role: String,
    /// What it holds.
    pub content: Vec<Content>,
}

impl Message {
    /// A message of `n_images` images and a text after them.
    pub fn new(role: &str, n_images: usize, text: &str) -> Self {
        let images = std::iter::repeat_n(Content::Image, n_images);
        Self { role: role.to_owned(), content: images.chain([Content::Text(text.to_owned())]).collect() }
    }
}

/// How a template wants the content of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContentForm {
    /// `[{"type": "image"}, {"type": "text", "text": …}]`, as multimodal templates do.
    Parts,
    /// One string, with `<image>\n` where an image goes, as templates of text models do.
    String,
}

/// A parsed chat template.
pub struct ChatTemplate {
    name: String,
    source: String,
    environment: Environment<'static>,
    form: ContentForm,
}

impl ChatTemplate {
    /// The chat template of a checkpoint folder: `chat_template.jinja`, or the key `chat_template` of `chat_template.json`,
    /// `processor_config.json` or `tokenizer_config.json`. `None` if there is none.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] for a file that cannot be read or understood, [`Error::Template`] for a template that does
    /// not parse.
    pub fn open(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        let path = folder.join("chat_template.jinja");
        if let Some(bytes) = read(&path, MAX_SOURCE_BYTES as u64)? {
            let source = String::from_utf8(bytes).map_err(|_| Error::file(&path, "not UTF-8"))?;
            return Self::parse(&path.display().to_string(), &source).map(Some);
        }
        for name in ["chat_template.json", "processor_config.json", "tokenizer_config.json"] {
            let path = folder.join(name);
            let Some(bytes) = read(&path, super::open::MAX_JSON_BYTES)? else { continue };
            let file: Map<String, Value> =
                serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, format!("not a JSON object: {e}")))?;
            let named = |list: &[Value]| {
                let template = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default")).or(list.first());
                template.and_then(|t| t.get("template")?.as_str()).map(str::to_owned)
            };
            let source = match file.get("chat_template") {
                None | Some(Value::Null) => continue,
                Some(Value::String(source)) => Some(source.clone()),
                Some(Value::Array(list)) => named(list),
                Some(_) => None,
            };
            let source =
                source.ok_or_else(|| Error::file(&path, "its `chat_template` is neither a string nor a list of templates"))?;
            return Self::parse(&path.display().to_string(), &source).map(Some);
        }
        Ok(None)
    }

    /// Parses a template; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Template`] if it does not parse or is larger than any real one.
    pub fn parse(name: &str, source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(Error::template(name, format!("{} bytes; the limit is {MAX_SOURCE_BYTES}", source.len())));
        }
        let failed = |e: minijinja::Error| Error::template(name, describe(&e));
        let mut environment = Environment::new();
        // As transformers sets its own Jinja up.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(|state, value, method, arguments| match method {
            // A width in its format string costs no fuel.
            "format" => Err(minijinja::Error::new(ErrorKind::UnknownMethod, "`format` is not supported")),
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments),
        });
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("it refuses the conversation: {message}")))
        });
        environment.add_filter("tojson", tojson);
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.add_template_owned("chat", without_generation_tags(source)).map_err(failed)?;
        let mut template = Self { name: name.to_owned(), source: source.to_owned(), environment, form: ContentForm::Parts };
        template.form = template.find_form();
        Ok(template)
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt of a conversation, with the beginning of an answer if `add_generation_prompt`.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the conversation, fails, does not end within its limits, or takes a text apart;
    /// [`Error::Usage`] for a role that is no plain word.
    pub fn render(&self, messages: &[Message], tokenizer: &Tokenizer, add_generation_prompt: bool) -> Result<Prompt> {
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default();
        let tokens = json!({
            "bos_token": token(tokenizer.bos()),
            "eos_token": token(tokenizer.eos()),
            "unk_token": token(tokenizer.unk()),
            "pad_token": token(tokenizer.pad()),
        });
        self.render_with(messages, tokens, tokenizer.control_tokens(), add_generation_prompt)
    }

    fn render_with<'a>(
        &self,
        messages: &[Message],
        tokens: Value,
        specials: impl IntoIterator<Item = &'a str>,
        add_generation_prompt: bool,
    ) -> Result<Prompt> {
        let is_word = |role: &str| !role.is_empty() && role.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
        if let Some(message) = messages.iter().find(|m| !is_word(&m.role)) {
            return Err(Error::usage(format!("the role {:?} is no plain word like `user`", message.role)));
        }
        let mut texts = Vec::new();
        let context = self.context(messages, self.form, tokens, add_generation_prompt, &mut texts);
        let output = self.run(&context).map_err(|problem| Error::template(&self.name, problem))?;
        self.fill(&output, &texts, specials)
    }

    /// The variables that a template sees; `texts` receives what the placeholders stand for.
    fn context<'t>(
        &self,
        messages: &'t [Message],
        form: ContentForm,
        tokens: Value,
        add_generation_prompt: bool,
        texts: &mut Vec<&'t str>,
    ) -> Value {
        let mut placeholder = |text: &'t str| {
            let words = text.trim();
            if words.is_empty() {
                return text.to_owned();
            }
            let start = text.len() - text.trim_start().len();
            texts.push(words);
            format!("{}{OPEN}{}{CLOSE}{}", &text[..start], texts.len() - 1, &text[start + words.len()..])
        };
        let mut content = |parts: &'t [Content]| match form {
            ContentForm::Parts => {
                let part = |part: &'t Content| match part {
                    Content::Image => json!({"type": "image"}),
                    Content::Text(text) => json!({"type": "text", "text": placeholder(text)}),
                };
                Value::Array(parts.iter().map(part).collect())
            }
            ContentForm::String => {
                let part = |part: &'t Content| match part {
                    Content::Image => format!("{IMAGE_MARK}\n"),
                    Content::Text(text) => placeholder(text),
                };
                Value::String(parts.iter().map(part).collect())
            }
        };
        let messages: Vec<Value> = messages.iter().map(|m| json!({"role": m.role, "content": content(&m.content)})).collect();
        let mut context = json!({
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": null, "documents": null,
        });
        if let (Value::Object(context), Value::Object(tokens)) = (&mut context, tokens) {
            context.extend(tokens);
        }
        context
    }

    /// Renders within the limits.
    fn run(&self, context: &Value) -> Result<String, String> {
        let mut output = CappedOutput { bytes: Vec::new(), limit: MAX_OUTPUT_BYTES };
        let template = self.environment.get_template("chat").map_err(|e| describe(&e))?;
        let rendered = template.render_captured_to(minijinja::Value::from(Serde(context)), &mut output).map(drop);
        rendered.map_err(|e| describe(&e))?;
        String::from_utf8(output.bytes).map_err(|_| "its output is not UTF-8".to_owned())
    }

    /// Puts the texts in the place of their placeholders.
    fn fill<'a>(&self, output: &str, texts: &[&str], specials: impl IntoIterator<Item = &'a str>) -> Result<Prompt> {
        let torn = || Error::template(&self.name, "it takes the text of a message apart, which is not supported");
        let marks = marks(specials);
        let mut prompt = Prompt::new();
        let mut literals = output.split(OPEN);
        let mut words = literals.next().unwrap_or_default();
        loop {
            if words.contains(CLOSE) {
                return Err(torn());
            }
            prompt.template(words, &marks);
            let Some(next) = literals.next() else { return Ok(prompt) };
            let (number, rest) = next.split_once(CLOSE).ok_or_else(torn)?;
            let text = number.parse().ok().and_then(|i: usize| texts.get(i)).ok_or_else(torn)?;
            prompt.text(text);
            words = rest;
        }
    }

    /// Finds out by a trial which form of content the template understands.
    fn find_form(&self) -> ContentForm {
        let trial = [Message::new("user", 1, "x")];
        let understands = |form| {
            let context = self.context(&trial, form, json!({"bos_token": "", "eos_token": ""}), true, &mut Vec::new());
            // A template for strings that is handed a list prints the list, keys and all.
            self.run(&context)
                .is_ok_and(|output| output.contains(OPEN) && !output.contains("\"type\"") && !output.contains("'type'"))
        };
        match (understands(ContentForm::Parts), understands(ContentForm::String)) {
            (true, _) => ContentForm::Parts,
            (false, true) => ContentForm::String,
            // It refuses the trial itself, which has neither system prompt nor history: judge by what it speaks of.
            (false, false) if self.source.contains("type") => ContentForm::Parts,
            (false, false) => ContentForm::String,
        }
    }
}

/// Collects output up to the limit.
struct CappedOutput {
    bytes: Vec<u8>,
    limit: usize,
}

impl std::io::Write for CappedOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(std::io::Error::other(format!("its output is longer than {} bytes", self.limit)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `tojson` as transformers defines it: Python's separators, nothing escaped for HTML. It stops at a limit, which
/// minijinja's own, charged after the fact, does not.
fn tojson(value: minijinja::Value, arguments: Kwargs) -> Result<minijinja::Value, minijinja::Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let mut output = CappedOutput { bytes: Vec::new(), limit: MAX_TOJSON_BYTES };
    let indent = indent.map(|n| " ".repeat(n.min(16)));
    let written = match &indent {
        Some(indent) => {
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut output, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut output, PythonSeparators)),
    };
    written.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))?;
    Ok(String::from_utf8_lossy(&output.bytes).into_owned().into())
}

/// `", "` and `": "`, as `json.dumps` writes.
struct PythonSeparators;

impl serde_json::ser::Formatter for PythonSeparators {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// An error of minijinja with its causes, on one line.
fn describe(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("it does not end within {FUEL} steps");
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text.replace('\n', " ")
}

/// The source with `{% generation %}` and `{% endgeneration %}` turned to comments, which treat white space as tags do. They mark
/// what to train on; minijinja does not know them.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}").map(|n| n + 2) else { break };
        let tag = &rest[at..at + length];
        let inner = &tag[2..tag.len() - 2];
        let (open, inner) = inner.strip_prefix(['-', '+']).map_or(("", inner), |i| (&tag[2..3], i));
        let (close, inner) = inner.strip_suffix(['-', '+']).map_or(("", inner), |i| (&tag[tag.len() - 3..tag.len() - 2], i));
        out.push_str(&rest[..at]);
        if matches!(inner.trim(), "generation" | "endgeneration") {
            out.push_str(&format!("{{#{open} {close}#}}"));
            rest = &rest[at + length..];
        } else {
            out.push_str("{%");
            rest = &rest[at + 2..];
        }
    }
    out.push_str(rest);
    out
}

/// Seconds since 1970, UTC.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The date of `seconds` after 1970 (UTC) in a `strftime` format; what it does not know stays as it is.
fn strftime(format: &str, seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let weekday = DAYS[(days % 7) as usize];
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    // 400 years have 146097 days; what is left is counted off by years and months.
    let (mut year, mut day) = (1970 + days / 146_097 * 400, days % 146_097);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let (mut month, mut day_of_month) = (0, day);
    while day_of_month >= lengths[month] {
        day_of_month -= lengths[month];
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, (c == '%').then(|| chars.next()).flatten()) {
            ('%', Some('Y')) => out.push_str(&year.to_string()),
            ('%', Some('y')) => out.push_str(&format!("{:02}", year % 100)),
            ('%', Some('m')) => out.push_str(&format!("{:02}", month + 1)),
            ('%', Some('d')) => out.push_str(&format!("{:02}", day_of_month + 1)),
            ('%', Some('j')) => out.push_str(&format!("{:03}", day + 1)),
            ('%', Some('B')) => out.push_str(MONTHS[month]),
            ('%', Some('b')) => out.push_str(&MONTHS[month][..3]),
            ('%', Some('A')) => out.push_str(weekday),
            ('%', Some('a')) => out.push_str(&weekday[..3]),
            ('%', Some('H')) => out.push_str(&format!("{hour:02}")),
            ('%', Some('I')) => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            ('%', Some('p')) => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            ('%', Some('M')) => out.push_str(&format!("{minute:02}")),
            ('%', Some('S')) => out.push_str(&format!("{:02}", second % 60)),
            ('%', Some('%')) => out.push('%'),
            ('%', Some(other)) => out.extend(['%', other]),
            (c, _) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{strftime, without_generation_tags};

    #[test]
    fn dates_are_the_calendars() {
        for (seconds, date) in [
            (0, "1970-01-01 Thu 00:00:00 AM 001"),
            (951_782_400, "2000-02-29 Tue 00:00:00 AM 060"),
            (1_704_067_199, "2023-12-31 Sun 23:59:59 PM 365"),
            (4_107_542_400, "2100-03-01 Mon 00:00:00 AM 060"),
        ] {
            assert_eq!(strftime("%Y-%m-%d %a %H:%M:%S %p %j", seconds), date);
        }
        assert_eq!(strftime("%d %B %y %I%% %Q %", 0), "01 January 70 12% %Q %");
    }

    #[test]
    fn generation_tags_become_comments() {
        let source = "{%- generation -%}a{%endgeneration%}{% if x %}{{ generation }}{% set generations = 1 %}{%";
        let expected = "{#- -#}a{# #}{% if x %}{{ generation }}{% set generations = 1 %}{%";
        assert_eq!(without_generation_tags(source), expected);
    }
}
