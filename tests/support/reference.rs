//! What PyTorch makes of models: files of tools/reference/make_gradients.py and make_lora.py.

use llava_engine::model::Slot;
use llava_engine::tensor::Tensor;
use safetensors::SafeTensors;

use super::fixture;

/// What PyTorch makes of a model.
pub struct Reference(Vec<u8>);

impl Reference {
    /// Gradients of all of a model, and the batch that they are of.
    pub fn of(model: &str) -> Self {
        Self::read(&format!("gradients/{model}.safetensors"))
    }

    pub fn read(path: &str) -> Self {
        Self(std::fs::read(fixture(path)).unwrap())
    }

    pub fn tensor(&self, name: &str) -> Tensor {
        let shape = SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().shape().to_vec();
        Tensor::from_slice(&shape, &self.f32(name))
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
    }

    pub fn i32(&self, name: &str) -> Vec<i32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
    }

    /// Whether it has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).is_ok()
    }

    /// The rest of all names that begin so, sorted.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let mut names: Vec<_> = tensors.names().iter().filter_map(|n| Some(n.strip_prefix(prefix)?.to_owned())).collect();
        names.sort();
        names
    }

    /// Its two sequences in the model's positions: slots, what is learned, lengths.
    pub fn batch(&self) -> (Vec<Slot>, Vec<bool>, Vec<usize>) {
        let (mut slots, mut is_learned, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let image = self.i32("image_token_id")[0];
        let mut feature_row = 0;
        for i in 0..2 {
            let ids = self.i32(&format!("ids.{i}"));
            lengths.push(ids.len());
            for id in ids {
                slots.push(if id == image { Slot::Image { feature_row } } else { Slot::Token(id as u32) });
                feature_row += usize::from(id == image);
            }
            is_learned.extend(self.i32(&format!("is_learned.{i}")).iter().map(|&l| l != 0));
        }
        (slots, is_learned, lengths)
    }
}

/// How far a gradient is from the reference's, as a share of the length of that: ‖got − expected‖ / ‖expected‖.
pub fn distance(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let of = length(&mut expected.iter().map(|e| f64::from(*e)));
    assert!(of > 0.0, "the reference is zero");
    length(&mut got.iter().zip(expected).map(|(g, e)| f64::from(*g) - f64::from(*e))) / of
}

/// Fails if it is further than 1e-4.
pub fn assert_gradient(what: &str, got: &[f32], expected: &[f32]) {
    let error = distance(got, expected);
    assert!(error <= 1e-4, "{what}: the gradient is off by {error} of its length");
}
