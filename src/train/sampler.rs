//! The order in which rows are learnt: a function of seed and epoch alone, so that a run that was cut off goes on with the very next batch.

use std::cmp::Reverse;

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;
use serde::{Deserialize, Serialize};

/// How rows come together in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grouping {
    /// By chance.
    None,
    /// Rows with pictures and rows without apart, each of similar lengths, as `--group_by_modality_length` of LLaVA's own trainer.
    Modality,
    /// As many as fit into a number of tokens.
    Packed,
}

/// What order needs to know of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Words or tokens; at least 1.
    pub n: usize,
    /// Whether it has pictures.
    pub has_images: bool,
}

/// Where in the order of rows a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// Batches of it that are done.
    pub n_batches: usize,
}

/// How batches are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The same seed gives the same order.
    pub seed: u64,
    /// Which rows come together.
    pub grouping: Grouping,
    /// Rows of a batch; not used if packed.
    pub batch_size: usize,
    /// Batches of one optimizer step, among which lengths are shared out evenly.
    pub n_accumulated: usize,
    /// Tokens of a packed batch.
    pub pack_tokens: usize,
}

impl Order {
    /// The batches of an epoch, by the rows' indices. Every row is in exactly one; the last may be smaller.
    pub fn batches(&self, lengths: &[Length], epoch: u64) -> Vec<Vec<usize>> {
        let mut permute = Permutations::new(self.seed, epoch);
        let order = match self.grouping {
            Grouping::None => permute.next(lengths.len()),
            Grouping::Modality => by_modality(lengths, self.batch_size, self.n_accumulated, &mut |n| permute.next(n)),
            Grouping::Packed => return pack(&permute.next(lengths.len()), lengths, self.pack_tokens),
        };
        order.chunks(self.batch_size).map(<[usize]>::to_vec).collect()
    }
}

/// Hands out batches, epoch after epoch.
pub struct Sampler {
    order: Order,
    lengths: Vec<Length>,
    position: Position,
    /// Those of the epoch at hand.
    batches: Vec<Vec<usize>>,
}

impl Sampler {
    /// A sampler of at least one row that goes on at `position`.
    pub fn new(order: Order, lengths: Vec<Length>, position: Position) -> Self {
        let batches = order.batches(&lengths, position.epoch);
        Self { order, lengths, position, batches }
    }

    /// The next batch; after the last of an epoch comes the first of the next.
    pub fn next_batch(&mut self) -> &[usize] {
        while self.position.n_batches >= self.batches.len() {
            self.position = Position { epoch: self.position.epoch + 1, n_batches: 0 };
            self.batches = self.order.batches(&self.lengths, self.position.epoch);
        }
        self.position.n_batches += 1;
        &self.batches[self.position.n_batches - 1]
    }

    /// The batches of the next optimizer step: as many as are accumulated, or those that the epoch has left.
    pub fn next_step(&mut self) -> Vec<Vec<usize>> {
        let mut step = vec![self.next_batch().to_vec()];
        while step.len() < self.order.n_accumulated && self.position.n_batches < self.batches.len() {
            step.push(self.next_batch().to_vec());
        }
        step
    }

    /// Where it stands: a new sampler there goes on with the same batches.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes on at `position`.
    pub fn go_to(&mut self, position: Position) {
        if position.epoch != self.position.epoch {
            self.batches = self.order.batches(&self.lengths, position.epoch);
        }
        self.position = position;
    }

    /// Optimizer steps of the epoch at hand; the last may have fewer batches.
    pub fn steps_per_epoch(&self) -> usize {
        self.batches.len().div_ceil(self.order.n_accumulated)
    }
}

/// Permutations of an epoch, one after the other.
pub(super) struct Permutations(Pcg64);

impl Permutations {
    pub(super) fn new(seed: u64, epoch: u64) -> Self {
        Self(Pcg64::new(u128::from(seed), u128::from(epoch)))
    }

    /// A permutation of 0..n (Fisher and Yates).
    pub(super) fn next(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            all.swap(i, self.below(i as u64 + 1) as usize);
        }
        all
    }

    /// A number below `n`, each as likely: draws beyond the last multiple of n are drawn again.
    fn below(&mut self, n: u64) -> u64 {
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let draw = self.0.next_u64();
            if draw < limit {
                return draw % n;
            }
        }
    }
}

/// `get_modality_length_grouped_indices` of `llava/train/llava_trainer.py`, where `n_parts` is its world size: each modality is shuffled
/// and cut into mega-batches of `n_parts` batches; each of these is sorted by length and shared out to batches of about equal length; all
/// full ones are shuffled; the rest of both comes last. (Where all rows are text only, the original sorts by lengths that it made negative,
/// and gives one batch all the long ones; here such rows are grouped as those with pictures are.) `permute(n)` gives permutations of 0..n.
fn by_modality(lengths: &[Length], batch_size: usize, n_parts: usize, permute: &mut dyn FnMut(usize) -> Vec<usize>) -> Vec<usize> {
    let of = |has_images| (0..lengths.len()).filter(|&i| lengths[i].has_images == has_images).collect::<Vec<_>>();
    let (with_images, text_only) = (of(true), of(false));
    if with_images.is_empty() || text_only.is_empty() {
        return by_length(&(0..lengths.len()).collect::<Vec<_>>(), lengths, batch_size, n_parts, permute).concat();
    }
    let mut with_images = by_length(&with_images, lengths, batch_size, n_parts, permute);
    let mut text_only = by_length(&text_only, lengths, batch_size, n_parts, permute);
    let mut rest = [with_images.pop(), text_only.pop()].into_iter().flatten().flatten().collect::<Vec<_>>();
    let full: Vec<Vec<usize>> = with_images.into_iter().chain(text_only).collect();
    let mut order: Vec<usize> = permute(full.len()).into_iter().flat_map(|i| full[i].iter().copied()).collect();
    rest.sort_unstable();
    order.extend(rest);
    order
}

/// `get_length_grouped_indices` over some of the rows: the mega-batches.
fn by_length(
    rows: &[usize],
    lengths: &[Length],
    batch_size: usize,
    n_parts: usize,
    permute: &mut dyn FnMut(usize) -> Vec<usize>,
) -> Vec<Vec<usize>> {
    let shuffled: Vec<usize> = permute(rows.len()).into_iter().map(|i| rows[i]).collect();
    let mega_batch = |rows: &[usize]| {
        let mut rows = rows.to_vec();
        rows.sort_by_key(|&i| Reverse(lengths[i].n));
        even_parts(&rows, lengths, n_parts).concat()
    };
    shuffled.chunks(batch_size * n_parts).map(mega_batch).collect()
}

/// `split_to_even_chunks`: the next row goes to the part that is shortest so far and not full.
fn even_parts(rows: &[usize], lengths: &[Length], n_parts: usize) -> Vec<Vec<usize>> {
    if rows.len() % n_parts != 0 {
        return (0..n_parts).map(|part| rows.iter().skip(part).step_by(n_parts).copied().collect()).collect();
    }
    let n_rows = rows.len() / n_parts;
    let mut parts = vec![(0, Vec::new()); n_parts];
    for &row in rows {
        // There is always one, as there are as many places as rows.
        let open = parts.iter_mut().filter(|(_, part): &&mut (usize, Vec<usize>)| part.len() < n_rows);
        if let Some((length, part)) = open.min_by_key(|(length, _)| *length) {
            *length += lengths[row].n;
            part.push(row);
        }
    }
    parts.into_iter().map(|(_, part)| part).collect()
}

/// Batches that a row may still be put into: enough to fill them well, few enough that order stays one of chance.
const OPEN_BATCHES: usize = 64;

/// Rows in their order, each put into the first open batch that has room for it. A row that is longer than a batch is one by itself: it
/// will be cut off.
fn pack(order: &[usize], lengths: &[Length], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    for &row in order {
        let n = lengths[row].n;
        let open = batches.len().saturating_sub(OPEN_BATCHES);
        match batches[open..].iter_mut().find(|(n_tokens, _)| n_tokens + n <= max_tokens) {
            Some((n_tokens, rows)) => {
                *n_tokens += n;
                rows.push(row);
            }
            None => batches.push((n, vec![row])),
        }
    }
    batches.into_iter().map(|(_, rows)| rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITH: Length = Length { n: 1, has_images: true };

    fn order(grouping: Grouping) -> Order {
        Order { seed: 7, grouping, batch_size: 4, n_accumulated: 3, pack_tokens: 100 }
    }

    fn lengths(n: usize) -> Vec<Length> {
        (0..n).map(|i| Length { n: 1 + i * 37 % 61, has_images: i % 3 != 0 }).collect()
    }

    /// The original's own results, with the permutations that it drew: `tools/reference/make_masks.py`.
    #[test]
    fn grouping_is_the_originals() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/masks/sampler.json");
        let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let numbers = |v: &serde_json::Value| serde_json::from_value::<Vec<i64>>(v.clone()).unwrap();
        let cases = file["cases"].as_array().unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let lengths: Vec<_> =
                numbers(&case["lengths"]).iter().map(|n| Length { n: n.unsigned_abs() as usize, has_images: *n > 0 }).collect();
            let mut permutations = case["permutations"].as_array().unwrap().iter();
            let mut permute = |n: usize| {
                let next = numbers(permutations.next().unwrap());
                assert_eq!(next.len(), n);
                next.into_iter().map(|i| i as usize).collect()
            };
            let size = |key: &str| case[key].as_u64().unwrap() as usize;
            let ours = by_modality(&lengths, size("batch_size"), size("world_size"), &mut permute);
            assert_eq!(ours, numbers(&case["order"]).into_iter().map(|i| i as usize).collect::<Vec<_>>());
            assert!(permutations.next().is_none());
        }
    }

    #[test]
    fn every_row_comes_once_an_epoch() {
        for grouping in [Grouping::None, Grouping::Modality, Grouping::Packed] {
            for n in [1, 2, 3, 111, 577, 989] {
                let mut all = order(grouping).batches(&lengths(n), 2).concat();
                all.sort_unstable();
                assert_eq!(all, (0..n).collect::<Vec<_>>(), "{grouping:?} {n}");
            }
        }
    }

    #[test]
    fn order_is_a_function_of_seed_and_epoch() {
        let lengths = lengths(577);
        for grouping in [Grouping::None, Grouping::Modality, Grouping::Packed] {
            let order = order(grouping);
            let batches = order.batches(&lengths, 1);
            assert_eq!(batches, order.batches(&lengths, 1));
            assert_ne!(batches, order.batches(&lengths, 0));
            assert_ne!(batches, Order { seed: 8, ..order }.batches(&lengths, 1));
        }
    }

    /// The same draws by NumPy's PCG64 with its state set to what the paper makes of seed and stream.
    #[test]
    fn permutations_are_those_of_pcg64() {
        assert_eq!(Permutations::new(42, 0).next(10), GOLDEN_42_0);
        assert_eq!(Permutations::new(42, 3).next(10), GOLDEN_42_3);
    }

    const GOLDEN_42_0: [usize; 10] = [7, 9, 6, 2, 1, 3, 5, 8, 4, 0];
    const GOLDEN_42_3: [usize; 10] = [9, 5, 2, 6, 3, 8, 4, 1, 7, 0];

    #[test]
    fn all_permutations_are_as_likely() {
        let mut counts = std::collections::HashMap::new();
        let mut permutations = Permutations::new(3, 0);
        for _ in 0..24_000 {
            *counts.entry(permutations.next(4)).or_insert(0) += 1;
        }
        // 1000 each, with a deviation of 31; five of these.
        assert!(counts.len() == 24 && counts.values().all(|n| (845..1155).contains(n)), "{counts:?}");
    }

    #[test]
    fn a_run_goes_on_where_it_was_cut_off() {
        for grouping in [Grouping::None, Grouping::Modality, Grouping::Packed] {
            let new = |position| Sampler::new(order(grouping), lengths(23), position);
            let mut whole = new(Position::default());
            let run: Vec<(Vec<usize>, Position)> = (0..40)
                .map(|_| {
                    let batch = whole.next_batch().to_vec();
                    (batch, whole.position())
                })
                .collect();
            assert!(whole.position().epoch >= 2);
            let epochs: Vec<_> = (0..3).flat_map(|epoch| order(grouping).batches(&lengths(23), epoch)).collect();
            let n = epochs.len().min(run.len());
            assert_eq!(run.iter().take(n).map(|(batch, _)| batch).collect::<Vec<_>>(), epochs.iter().take(n).collect::<Vec<_>>());
            for cut in 0..run.len() {
                // As a checkpoint keeps it.
                let kept = serde_json::to_string(&run[cut].1).unwrap();
                let mut rest = new(serde_json::from_str(&kept).unwrap());
                for (batch, _) in &run[cut + 1..] {
                    assert_eq!(rest.next_batch(), batch, "{grouping:?} cut after {cut}");
                }
            }
        }
    }

    #[test]
    fn steps_are_counted_with_the_last_incomplete_one() {
        let steps = |n| Sampler::new(order(Grouping::None), vec![WITH; n], Position::default()).steps_per_epoch();
        assert_eq!([1, 12, 13, 24, 25].map(steps), [1, 1, 2, 2, 3]);
    }

    #[test]
    fn packed_batches_are_full_and_never_too_full() {
        let lengths: Vec<_> = lengths(989).iter().map(|l| Length { n: l.n * 3, ..*l }).collect();
        let batches = order(Grouping::Packed).batches(&lengths, 0);
        let tokens = |batch: &Vec<usize>| batch.iter().map(|&i| lengths[i].n.min(100)).sum::<usize>();
        assert!(batches.iter().all(|b| tokens(b) <= 100));
        let total: usize = batches.iter().map(tokens).sum();
        assert!(total * 10 >= batches.len() * 100 * 8, "{total} tokens in {} batches", batches.len());
        // Longer than a batch: cut off, but there.
        let long = [Length { n: 5000, ..WITH }, WITH];
        assert_eq!(order(Grouping::Packed).batches(&long, 0).len(), 2);
    }

    #[test]
    fn modalities_are_kept_apart_but_for_the_last_batches() {
        let lengths = lengths(989);
        let order = order(Grouping::Modality);
        let batches = order.batches(&lengths, 0);
        let mixed = |b: &Vec<usize>| b.iter().any(|&i| lengths[i].has_images != lengths[b[0]].has_images);
        let n_rest = 2 * order.n_accumulated;
        assert!(batches[..batches.len() - n_rest].iter().all(|b| !mixed(b)));
    }

    /// Steps do not reach from one epoch into the next, and are as many as was said.
    #[test]
    fn steps_end_with_an_epoch() {
        for (n_rows, sizes) in [(1, vec![1]), (12, vec![3]), (17, vec![3, 2]), (29, vec![3, 3, 2])] {
            let order = Order { seed: 1, grouping: Grouping::None, batch_size: 4, n_accumulated: 3, pack_tokens: 0 };
            let mut sampler = Sampler::new(order, vec![WITH; n_rows], Position::default());
            assert_eq!(sampler.steps_per_epoch(), sizes.len(), "{n_rows} rows");
            for epoch in 0..3 {
                let steps: Vec<_> = sizes.iter().map(|_| sampler.next_step()).collect();
                assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), sizes, "{n_rows} rows, epoch {epoch}");
                let mut rows = steps.concat().concat();
                rows.sort();
                assert_eq!(rows, (0..n_rows).collect::<Vec<_>>(), "epoch {epoch}");
            }
        }
    }
}
