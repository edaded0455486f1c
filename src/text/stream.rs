//! An answer's ids to text as they come, and the strings that end it.

use super::decode::Spelling;
use super::tokenizer::Tokenizer;

/// Decodes ids one by one. What it returns, put together, is [`Tokenizer::decode`] of all the ids; no half of a character is ever
/// returned, and the cost of an id does not grow with the answer.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// The beginning of a character whose other bytes have not come yet: at most 3 bytes between calls.
    pending: Vec<u8>,
    started: bool,
}

impl<'a> StreamDecoder<'a> {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new(), started: false }
    }

    /// The text that `id` completes; empty for special tokens, unknown ids, and bytes of a character still incomplete.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend_from_slice(self.tokenizer.spellings().bytes(id));
        let mut text = String::new();
        let mut at = 0;
        while at < self.pending.len() {
            let rest = &self.pending[at..];
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    at = self.pending.len();
                }
                Err(e) => {
                    // The part before the error is valid, so nothing is replaced here.
                    text.push_str(&String::from_utf8_lossy(&rest[..e.valid_up_to()]));
                    at += e.valid_up_to();
                    let Some(n_bytes) = e.error_len() else { break };
                    self.replace(&mut text, n_bytes);
                    at += n_bytes;
                }
            }
        }
        self.pending.drain(..at);
        self.without_first_space(text)
    }

    /// The end of the text: what was left of an incomplete character, as replacement characters.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        if !self.pending.is_empty() {
            self.replace(&mut text, self.pending.len());
            self.pending.clear();
        }
        self.without_first_space(text)
    }

    /// Bytes that are no character: SentencePiece writes U+FFFD for each, byte-level vocabularies one for all.
    fn replace(&self, text: &mut String, n_bytes: usize) {
        let n = if self.tokenizer.spellings().spelling == Spelling::ByteLevel { 1 } else { n_bytes };
        text.extend(std::iter::repeat_n('\u{fffd}', n));
    }

    /// Takes away the one space that encoding puts in front of every text.
    fn without_first_space(&mut self, mut text: String) -> String {
        if !self.started && !text.is_empty() {
            self.started = true;
            if self.tokenizer.spellings().spelling == (Spelling::SentencePiece { strip_first_space: true }) && text.starts_with(' ')
            {
                text.remove(0);
            }
        }
        text
    }
}

/// Finds stop strings in a text that comes in pieces, however it is cut. Text is held back only while it may still turn out to be
/// the beginning of a stop string.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher of these strings; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new(), stopped: false }
    }

    /// Takes more text; returns what can be shown of it and whether a stop string has ended the answer. The stop string itself is
    /// not shown. Of several, the one that is complete first counts; of those the longest.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.stopped {
            return (String::new(), true);
        }
        self.held.push_str(text);
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((_, start)) = ends.min() {
            self.held.truncate(start);
            self.stopped = true;
            return (std::mem::take(&mut self.held), true);
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let may_begin = |at: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        // Only the last `longest - 1` bytes can still become a stop string.
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        let keep = (first..self.held.len()).find(|&at| self.held.is_char_boundary(at) && may_begin(at));
        let tail = self.held.split_off(keep.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// The end of the text: what was held back, since no stop string came of it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::StopMatcher;

    fn run(stops: &[&str], chunks: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut shown: Vec<String> = chunks.iter().map(|chunk| matcher.push(chunk).0).collect();
        shown.push(matcher.finish());
        (shown, matcher.stopped())
    }

    #[test]
    fn a_stop_string_may_span_chunks() {
        let (shown, stopped) = run(&["###"], &["a#", "#", "#b"]);
        assert_eq!((shown.concat().as_str(), stopped), ("a", true));
        assert_eq!(shown[0], "a", "what cannot become a stop string is shown at once");
    }

    #[test]
    fn what_was_held_back_in_vain_is_shown() {
        let (shown, stopped) = run(&["</s>"], &["a <", "b", "</", "s"]);
        assert_eq!(shown, ["a ", "<b", "", "", "</s"]);
        assert!(!stopped);
    }

    #[test]
    fn the_stop_that_is_complete_first_counts() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]).0.concat(), "xa");
        assert_eq!(run(&["abcd", "bc"], &["xab", "cd"]).0.concat(), "xa");
        assert_eq!(run(&["bc", "abc"], &["xabc"]).0.concat(), "x");
        assert_eq!(run(&["é"], &["caf", "é!"]).0.concat(), "caf");
        assert_eq!(run(&["", "\u{1f999}"], &["ab"]).0.concat(), "ab", "empty stop strings are none");
    }

    #[test]
    fn nothing_comes_after_the_end() {
        let mut matcher = StopMatcher::new(vec!["x".into()]);
        assert_eq!(matcher.push("axb"), ("a".into(), true));
        assert_eq!(matcher.push("c"), (String::new(), true));
        assert_eq!(matcher.finish(), "");
    }

    proptest! {
        /// What is shown does not depend on how the text is cut, and is what a search of the whole text finds.
        #[test]
        fn cuts_do_not_matter(text in "[abé]{0,24}", stops in prop::collection::vec("[abé]{1,4}", 0..4), cuts in prop::collection::vec(1usize..4, 24)) {
            let mut matcher = StopMatcher::new(stops.clone());
            let (mut shown, mut chars) = (String::new(), text.chars().peekable());
            for n in cuts {
                let chunk: String = chars.by_ref().take(n).collect();
                shown += &matcher.push(&chunk).0;
            }
            shown += &matcher.finish();
            let ends = |end: usize| stops.iter().filter(|s| text[..end].ends_with(s.as_str())).map(String::len).max().map(|n| end - n);
            let start = (0..=text.len()).filter(|&e| text.is_char_boundary(e)).find_map(ends);
            prop_assert_eq!(&shown, &text[..start.unwrap_or(text.len())]);
            prop_assert_eq!(matcher.stopped(), start.is_some());
        }
    }
}
