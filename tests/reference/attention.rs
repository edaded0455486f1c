//! out = softmax(q·Kᵀ/√head_dim)·V

/// One sequence: q `[rows, n_heads, d]`, k and v `[context, n_kv_heads, d]`, out `[rows, n_heads, d]`; row r sees `visible(r)` tokens.
pub struct Sequence<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
}

/// Both precisions are the same code.
macro_rules! attention {
    ($name:ident, $F:ty) => {
        /// In this precision throughout.
        pub fn $name(s: &Sequence<'_>, visible: impl Fn(usize) -> usize) -> Vec<$F> {
            let d = s.head_dim;
            let mut out = Vec::new();
            for (row, q) in s.q.chunks(s.n_heads * d).enumerate() {
                for head in 0..s.n_heads {
                    let kv_head = head / (s.n_heads / s.n_kv_heads);
                    let at = |token: usize, i: usize| (token * s.n_kv_heads + kv_head) * d + i;
                    let scores: Vec<$F> = (0..visible(row))
                        .map(|token| {
                            let dot = (0..d).fold(0.0, |sum, i| sum + q[head * d + i] as $F * s.k[at(token, i)] as $F);
                            dot / (d as $F).sqrt()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(<$F>::NEG_INFINITY, <$F>::max);
                    let p: Vec<$F> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum = p.iter().fold(0.0, |sum, p| sum + p);
                    for i in 0..d {
                        out.push(p.iter().enumerate().fold(0.0, |acc, (token, p)| acc + p / sum * s.v[at(token, i)] as $F));
                    }
                }
            }
            out
        }
    };
}
attention!(exact, f64);
attention!(naive_f32, f32);
