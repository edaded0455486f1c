//! Norms, gates and rotations of rows.

/// Both precisions are the same code.
macro_rules! rows {
    ($precision:ident, $F:ty) => {
        /// In this precision throughout.
        pub mod $precision {
            fn wide(values: &[f32]) -> impl Iterator<Item = $F> + Clone {
                values.iter().map(|&v| v as $F)
            }

            fn mean(n: usize, values: impl Iterator<Item = $F>) -> $F {
                values.fold(0.0, |sum, v| sum + v) / n as $F
            }

            /// x·w / sqrt(mean(x²) + eps)
            pub fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<$F> {
                let mut y = Vec::new();
                for row in x.chunks(w.len()) {
                    let rms = (mean(w.len(), wide(row).map(|v| v * v)) + eps as $F).sqrt();
                    y.extend(wide(row).zip(wide(w)).map(|(x, w)| x / rms * w));
                }
                y
            }

            /// (x − mean(x))·w / sqrt(var(x) + eps) + b
            pub fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<$F> {
                let mut y = Vec::new();
                for row in x.chunks(w.len()) {
                    let mean_x = mean(w.len(), wide(row));
                    let std = (mean(w.len(), wide(row).map(|v| (v - mean_x) * (v - mean_x))) + eps as $F).sqrt();
                    y.extend(wide(row).zip(wide(w)).zip(wide(b)).map(|((x, w), b)| (x - mean_x) / std * w + b));
                }
                y
            }

            /// silu(gate) ⊙ up, rows being `[gate | up]`, n of each
            pub fn silu_mul(gate_up: &[f32], n: usize) -> Vec<$F> {
                let mut y = Vec::new();
                for row in gate_up.chunks(2 * n) {
                    y.extend(wide(&row[..n]).zip(wide(&row[n..])).map(|(g, u)| g / (1.0 + (-g).exp()) * u));
                }
                y
            }

            /// One head, whose pairs (i, i + d/2) turn by angles of these cosines and sines.
            pub fn rotate(head: &[f32], cos: &[f32], sin: &[f32]) -> Vec<$F> {
                let (a, b) = head.split_at(cos.len());
                let turn = |x: &[f32], y: &[f32], sign: $F| -> Vec<$F> {
                    wide(x).zip(wide(y)).zip(wide(cos).zip(wide(sin))).map(|((x, y), (c, s))| x * c + sign * y * s).collect()
                };
                [turn(a, b, -1.0), turn(b, a, 1.0)].concat()
            }
        }
    };
}
rows!(exact, f64);
rows!(naive_f32, f32);
