//! Prompt lookup: what an answer repeats of its prompt, or of itself, is guessed from there and checked many tokens at a time.
//!
//! The last few tokens are looked for in all that came before; what followed them there is a draft. One pass runs the draft behind the token
//! that was drawn last and gives the logits after each of them. Tokens are then drawn one by one, with the random bits that they would have
//! had anyway; the first that is not the draft's ends the round. So the answer is what it would have been, greedy or not: only passes are
//! saved. (Saxena, "Prompt Lookup Decoding", 2023; the check is that of Leviathan et al., arXiv 2211.17192, with shared random bits.)

use crate::model::Slot;

/// The longest draft. With the token before it these are as many rows as each device runs through the very kernels of a single one, so that
/// logits are the same to the last bit on the CPU (`src/cpu/attention.rs`: spans of at most 4 rows).
pub const MAX_DRAFT: usize = 3;

/// Tokens that must be the same for what follows them to be a guess: the longest such run wins, and the latest of its places.
const NGRAMS: std::ops::RangeInclusive<usize> = 2..=4;

/// What to expect after `context`, at most `n` tokens: none if its end has not occurred before. Images are never expected.
pub fn draft(context: &[Slot], n: usize) -> Vec<Slot> {
    for ngram in NGRAMS.rev() {
        let Some(start) = context.len().checked_sub(ngram) else { continue };
        let end = &context[start..];
        // The end itself is no earlier place.
        let found = context[..context.len() - 1].windows(ngram).rposition(|window| window == end);
        let Some(at) = found else { continue };
        let follows = context[at + ngram..].iter().take(n);
        let draft: Vec<Slot> = follows.take_while(|slot| matches!(slot, Slot::Token(_))).copied().collect();
        if !draft.is_empty() {
            return draft;
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[u32]) -> Vec<Slot> {
        ids.iter().map(|&id| Slot::Token(id)).collect()
    }

    #[test]
    fn the_longest_and_latest_repetition_is_continued() {
        let draft = |ids: &[u32], n| draft(&tokens(ids), n);
        assert_eq!(draft(&[1, 2, 3, 4, 9, 1, 2], 3), tokens(&[3, 4, 9]));
        assert_eq!(draft(&[1, 2, 3, 4, 9, 1, 2], 1), tokens(&[3]));
        assert_eq!(draft(&[1, 2, 3, 7, 1, 2, 4, 8, 1, 2], 2), tokens(&[4, 8]), "the latest place");
        assert_eq!(draft(&[5, 1, 2, 3, 0, 6, 1, 2, 4, 5, 1, 2], 2), tokens(&[3, 0]), "three in a row beat two");
        assert_eq!(draft(&[1, 1, 1], 3), tokens(&[1]), "a place may overlap the end");
        assert_eq!(draft(&[1, 2, 3, 2], 3), [], "one token alone says too little");
        for short in [&[][..], &[1], &[1, 1]] {
            assert_eq!(draft(short, 3), [], "{short:?}");
        }
    }

    #[test]
    fn images_are_part_of_the_context_but_not_of_drafts() {
        let image = |feature_row| Slot::Image { feature_row };
        let context = [image(0), image(1), Slot::Token(5), Slot::Token(6), image(0), image(1)];
        assert_eq!(draft(&context, 3), tokens(&[5, 6]));
        let context = [Slot::Token(5), Slot::Token(6), image(0), Slot::Token(5), Slot::Token(6)];
        assert_eq!(draft(&context, 3), []);
    }
}
