//! Norms, gates, activations and rotations of rows.

/// Both precisions are the same code. Inputs are f32, or f64 where finite differences are taken.
macro_rules! rows {
    ($precision:ident, $F:ty) => {
        /// In this precision throughout.
        pub mod $precision {
            fn wide<T: Copy + Into<f64>>(values: &[T]) -> impl Iterator<Item = $F> + Clone {
                values.iter().map(|&v| v.into() as $F)
            }

            fn mean(n: usize, values: impl Iterator<Item = $F>) -> $F {
                values.fold(0.0, |sum, v| sum + v) / n as $F
            }

            /// x·w / sqrt(mean(x²) + eps)
            pub fn rms_norm<T: Copy + Into<f64>>(x: &[T], w: &[T], eps: f32) -> Vec<$F> {
                let mut y = Vec::new();
                for row in x.chunks(w.len()) {
                    let rms = (mean(w.len(), wide(row).map(|v| v * v)) + eps as $F).sqrt();
                    y.extend(wide(row).zip(wide(w)).map(|(x, w)| x / rms * w));
                }
                y
            }

            /// (x − mean(x))·w / sqrt(var(x) + eps) + b
            pub fn layer_norm<T: Copy + Into<f64>>(x: &[T], w: &[T], b: &[T], eps: f32) -> Vec<$F> {
                let mut y = Vec::new();
                for row in x.chunks(w.len()) {
                    let mean_x = mean(w.len(), wide(row));
                    let std = (mean(w.len(), wide(row).map(|v| (v - mean_x) * (v - mean_x))) + eps as $F).sqrt();
                    y.extend(wide(row).zip(wide(w)).zip(wide(b)).map(|((x, w), b)| (x - mean_x) / std * w + b));
                }
                y
            }

            /// silu(gate) ⊙ up, rows being `[gate | up]`, n of each
            pub fn silu_mul<T: Copy + Into<f64>>(gate_up: &[T], n: usize) -> Vec<$F> {
                let mut y = Vec::new();
                for row in gate_up.chunks(2 * n) {
                    y.extend(wide(&row[..n]).zip(wide(&row[n..])).map(|(g, u)| g / (1.0 + (-g).exp()) * u));
                }
                y
            }

            /// One head, whose pairs (i, i + d/2) turn by angles of these cosines and sines.
            pub fn rotate<T: Copy + Into<f64>>(head: &[T], cos: &[f32], sin: &[f32]) -> Vec<$F> {
                let (a, b) = head.split_at(cos.len());
                let turn = |x: &[T], y: &[T], sign: $F| -> Vec<$F> {
                    wide(x).zip(wide(y)).zip(wide(cos).zip(wide(sin))).map(|((x, y), (c, s))| x * c + sign * y * s).collect()
                };
                [turn(a, b, -1.0), turn(b, a, 1.0)].concat()
            }
        }
    };
}
rows!(exact, f64);
rows!(naive_f32, f32);
