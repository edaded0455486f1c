//! Rows of data in the model's positions, and which of these are supervised.

use crate::data::{Fault, Row, RowError};
use crate::engine::Example;
use crate::model::Slot;
use crate::text::{Conversation, PlacedId, Style, Supervised, Template, Tokenizer};

/// Lays rows out for a model.
#[derive(Clone, Copy)]
pub struct Masker<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Whose manner of tokenizing it is used in.
    pub style: Style,
    /// What dresses the conversations.
    pub template: &'static Template,
    /// Positions that one picture takes.
    pub tokens_per_image: usize,
    /// Positions of the longest example; what is longer is cut off at its end.
    pub max_tokens: usize,
}

/// A row laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masked {
    /// Its positions, and which of them are supervised: those of answers, in the sense of [`Supervised`]. Image features never are.
    pub example: Example,
    /// Positions that it had before it was cut to the longest length.
    pub n_tokens: usize,
}

/// A stretch of a row's text, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stretch {
    /// Text that is read only.
    Context(String),
    /// Text that is learnt.
    Learnt(String),
    /// The features of an image, so many positions.
    Image(usize),
    /// Text that was cut off.
    Cut(String),
}

impl Masker<'_> {
    /// Lays a row out.
    ///
    /// A token is supervised if it begins within an answer: one that spans the border before an answer belongs to the prompt. The first
    /// `max_tokens` positions stay, images counted by their features.
    ///
    /// # Errors
    /// If the template cannot hold the row, or its text cannot be tokenized.
    pub fn mask(&self, row: &Row) -> Result<Masked, RowError> {
        let (supervised, ids) = self.place(row)?;
        let mut example = Example { slots: Vec::with_capacity(ids.len()), is_answer: Vec::with_capacity(ids.len()) };
        let (mut feature_row, mut answers) = (0, supervised.answers.iter().peekable());
        for placed in ids {
            while answers.next_if(|range| range.end <= placed.start).is_some() {}
            let learnt = placed.id.is_some() && answers.peek().is_some_and(|range| range.start <= placed.start);
            example.slots.extend(Slot::of(placed.id, feature_row, self.tokens_per_image));
            example.is_answer.resize(example.slots.len(), learnt);
            feature_row += if placed.id.is_none() { self.tokens_per_image } else { 0 };
        }
        let n_tokens = example.slots.len();
        example.slots.truncate(self.max_tokens);
        example.is_answer.truncate(self.max_tokens);
        Ok(Masked { example, n_tokens })
    }

    /// As [`mask`](Self::mask), for training.
    ///
    /// # Errors
    /// Also if there is nothing to learn: no answer has words, or all that is supervised was cut off.
    pub fn example(&self, row: &Row) -> Result<Masked, RowError> {
        if row.exchanges.iter().all(|e| e.answer.trim().is_empty()) {
            return Err(row.fault(Fault::NothingToLearn, "all its answers are empty"));
        }
        let masked = self.mask(row)?;
        match masked.example.first_answer() {
            Some(_) => Ok(masked),
            None => {
                let (n, max) = (masked.n_tokens, self.max_tokens);
                let problem = format!("its answers lie behind the first {max} of its {n} tokens, where it is cut off");
                Err(row.fault(Fault::NothingToLearn, problem))
            }
        }
    }

    /// The text of a row with its masks: what each position stands for, in order.
    ///
    /// # Errors
    /// As [`mask`](Self::mask).
    pub fn preview(&self, row: &Row) -> Result<Vec<Stretch>, RowError> {
        let (supervised, ids) = self.place(row)?;
        let masked = self.mask(row)?;
        let text = supervised.prompt.to_string();
        let (mut stretches, mut position) = (Vec::new(), 0);
        for (i, placed) in ids.iter().enumerate() {
            let end = ids.get(i + 1).map_or(text.len(), |next| next.start);
            if placed.id.is_none() {
                stretches.push(Stretch::Image(self.tokens_per_image.min(self.max_tokens.saturating_sub(position))));
                position += self.tokens_per_image;
                continue;
            }
            let words = &text[placed.start..end.max(placed.start)];
            let new: fn(String) -> Stretch = match masked.example.is_answer.get(position) {
                Some(false) => Stretch::Context,
                Some(true) => Stretch::Learnt,
                None => Stretch::Cut,
            };
            position += 1;
            match (stretches.last_mut(), new(String::new())) {
                (Some(Stretch::Context(last)), Stretch::Context(_))
                | (Some(Stretch::Learnt(last)), Stretch::Learnt(_))
                | (Some(Stretch::Cut(last)), Stretch::Cut(_)) => last.push_str(words),
                _ => stretches.push(new(words.to_owned())),
            }
        }
        Ok(stretches)
    }

    /// The conversation of a row and its ids.
    fn place(&self, row: &Row) -> Result<(Supervised, Vec<PlacedId>), RowError> {
        let mut conversation = Conversation::new(self.template);
        if let Some(system) = &row.system {
            conversation = conversation.with_system(system);
        }
        for exchange in &row.exchanges {
            conversation.add_user(&exchange.question, exchange.n_images).add_assistant(&exchange.answer);
        }
        let place = || {
            let supervised = conversation.supervised()?;
            let ids = self.tokenizer.place_prompt(&supervised.prompt, self.style)?;
            Ok((supervised, ids))
        };
        place().map_err(|e: crate::error::Error| row.fault(Fault::Template, e))
    }
}
