//! out = softmax(q·Kᵀ/√head_dim)·V, and its gradient.

/// One sequence: q `[rows, n_heads, d]`, k and v `[context, n_kv_heads, d]`, out `[rows, n_heads, d]`; row r sees `visible(r)` tokens.
pub struct Sequence<'a, T = f32> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
}

/// Both precisions are the same code. Inputs are f32, or f64 where finite differences are taken.
macro_rules! attention {
    ($name:ident, $F:ty) => {
        /// In this precision throughout.
        pub fn $name<T: Copy + Into<f64>>(s: &Sequence<'_, T>, visible: impl Fn(usize) -> usize) -> Vec<$F> {
            let d = s.head_dim;
            let mut out = Vec::new();
            for (row, q) in s.q.chunks(s.n_heads * d).enumerate() {
                for head in 0..s.n_heads {
                    let kv_head = head / (s.n_heads / s.n_kv_heads);
                    let at = |token: usize, i: usize| (token * s.n_kv_heads + kv_head) * d + i;
                    let scores: Vec<$F> = (0..visible(row))
                        .map(|token| {
                            let dot =
                                (0..d).fold(0.0, |sum, i| sum + q[head * d + i].into() as $F * s.k[at(token, i)].into() as $F);
                            dot / (d as $F).sqrt()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(<$F>::NEG_INFINITY, <$F>::max);
                    let p: Vec<$F> = scores.iter().map(|s| (s - max).exp()).collect();
                    let sum = p.iter().fold(0.0, |sum, p| sum + p);
                    for i in 0..d {
                        out.push(p.iter().enumerate().fold(0.0, |acc, (token, p)| acc + p / sum * s.v[at(token, i)].into() as $F));
                    }
                }
            }
            out
        }
    };
}
attention!(exact, f64);
attention!(naive_f32, f32);

/// Gradients of [`exact`] by q, k and v, where `d_out` is that by its result; and the log-sum-exp of each row and head.
pub struct Gradient {
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
    /// `[rows, n_heads]`
    pub lse: Vec<f64>,
}

/// By the chain rule, row by row: dP = dO·V, dS = P ⊙ (dP − Σ P ⊙ dP)/√d.
pub fn gradient(s: &Sequence<'_>, d_out: &[f32], visible: impl Fn(usize) -> usize) -> Gradient {
    let d = s.head_dim;
    let zeros = |x: &[f32]| vec![0.0; x.len()];
    let mut g = Gradient { dq: zeros(s.q), dk: zeros(s.k), dv: zeros(s.v), lse: Vec::new() };
    let scale = 1.0 / (d as f64).sqrt();
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    for (row, (q, d_out)) in s.q.chunks(s.n_heads * d).zip(d_out.chunks(s.n_heads * d)).enumerate() {
        for (head, (q, d_out)) in q.chunks(d).zip(d_out.chunks(d)).enumerate() {
            let kv_head = head / (s.n_heads / s.n_kv_heads);
            let at = |token: usize| (token * s.n_kv_heads + kv_head) * d;
            let scores: Vec<f64> = (0..visible(row)).map(|t| scale * dot(q, &s.k[at(t)..][..d])).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            g.lse.push(lse);
            let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
            let dp: Vec<f64> = (0..p.len()).map(|t| dot(d_out, &s.v[at(t)..][..d])).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            let dq = &mut g.dq[(row * s.n_heads + head) * d..][..d];
            for t in 0..p.len() {
                let ds = p[t] * (dp[t] - mean) * scale;
                for i in 0..d {
                    dq[i] += ds * f64::from(s.k[at(t) + i]);
                    g.dk[at(t) + i] += ds * f64::from(q[i]);
                    g.dv[at(t) + i] += p[t] * f64::from(d_out[i]);
                }
            }
        }
    }
    g
}
