//! Which elements [`GradOps::dropout`](super::GradOps::dropout) drops: a definition in integers, so that every device drops the same, and that
//! the backward finds the same again without a mask in memory.
//!
//! The random bits are those of Philox4x32-10, a generator without state (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC11):
//! element i has word i % 4 of the block whose counter is i / 4, in the lower 64 of its 128 bits.

/// Four words of random bits for a counter and a key, low words first.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85]; // the golden ratio and √3 − 1
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let (a, b) = (u64::from(MULTIPLIERS[0]) * u64::from(c0), u64::from(MULTIPLIERS[1]) * u64::from(c2));
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// What is dropped, and what becomes of the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Elements whose bits are below it are dropped: p·2³², to the nearest integer.
    pub threshold: u32,
    /// 1/(1 − p): the factor of those that are kept.
    pub scale: f32,
    /// Low word first.
    pub key: [u32; 2],
}

impl Dropout {
    /// Of a probability 0 <= p < 1.
    pub fn new(p: f32, key: u64) -> Self {
        // The largest p below 1 gives 2³² − 256.
        Self {
            threshold: (f64::from(p) * 2f64.powi(32)).round() as u32,
            scale: 1.0 / (1.0 - p),
            key: [key as u32, (key >> 32) as u32],
        }
    }

    /// The factors of elements 4·block .. 4·block + 4.
    pub fn factors(&self, block: u64) -> [f32; 4] {
        let bits = philox([block as u32, (block >> 32) as u32, 0, 0], self.key);
        bits.map(|bits| if bits < self.threshold { 0.0 } else { self.scale })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with their code (Random123, `kat_vectors`).
    #[test]
    fn philox_gives_the_published_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, answer) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(counter, key), answer);
        }
    }

    #[test]
    fn thresholds_are_the_probability() {
        assert_eq!((Dropout::new(0.0, 0).threshold, Dropout::new(0.0, 0).scale), (0, 1.0));
        assert_eq!((Dropout::new(0.5, 0).threshold, Dropout::new(0.5, 0).scale), (1 << 31, 2.0));
        assert_eq!(Dropout::new(1.0 - f32::EPSILON / 2.0, 0).threshold, u32::MAX - 255);
        assert_eq!(Dropout::new(0.0, 0x0123_4567_89ab_cdef).key, [0x89ab_cdef, 0x0123_4567]);
    }
}
