//! A conversation template as a Jinja source, for files that other programs read.

use serde_json::Value;

use super::{Layout, Template};

/// What was said, be it a text or a list of images and texts: images first.
const SAID: &str = "{% macro said(message) %}\
    {% if message['content'] is string %}{{ message['content'] }}{% else %}\
    {% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}\
    {% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
    {% endif %}{% endmacro %}";

impl Template {
    /// The template as a Jinja chat template of Hugging Face's kind, for vocabularies that put BOS in front by themselves. `None` for one
    /// that has more to it than roles and separators.
    pub fn to_jinja(&self) -> Option<String> {
        let (after_role, sep2) = match self.layout {
            Layout::Single => (": ", self.sep),
            Layout::Two => (": ", self.sep2),
            Layout::Mpt => ("", self.sep),
            Layout::Plain | Layout::Llama2 => return None,
        };
        if self.seed.is_some() || self.image_tags {
            return None;
        }
        // As JSON writes a string, so does Jinja.
        let literal = |text: &str| if text.is_empty() { String::new() } else { format!("{{{{ {} }}}}", Value::from(text)) };
        let role = |role: &str| literal(&format!("{role}{after_role}"));
        let system = |words: &str| format!("{}{words}{}", literal(self.system_role), literal(self.sep));
        Some(format!(
            "{SAID}\
             {{% if messages and messages[0]['role'] == 'system' %}}{}{{% else %}}{}{{% endif %}}\
             {{% for message in messages %}}\
             {{% if message['role'] == 'user' %}}{}{{{{ said(message) }}}}{}\
             {{% elif message['role'] == 'assistant' %}}{}{{{{ said(message) }}}}{}{{% endif %}}\
             {{% endfor %}}\
             {{% if add_generation_prompt %}}{}{{% endif %}}\n",
            system("{{ said(messages[0]) }}"),
            self.system.map(|words| system(&literal(words))).unwrap_or_default(),
            role(self.user),
            literal(self.sep),
            role(self.assistant),
            literal(sep2),
            literal(&format!("{}{}", self.assistant, after_role.trim_end())),
        ))
    }
}
