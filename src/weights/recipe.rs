//! [`Recipe`]: which matrices of a model are packed, and how.

use super::names::Part;
use crate::error::Result;
use crate::ops::packed::{Format, GROUPS};

/// How each part of a model is stored; none: as it was.
///
/// Norms, biases, and CLIP's own embeddings are never packed: they are small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The matrices of the decoder's layers.
    pub decoder: Option<Format>,
    /// The decoder's embedding, which may be its head too.
    pub embedding: Option<Format>,
    /// The decoder's head, if it has one of its own.
    pub head: Option<Format>,
    /// The projector.
    pub projector: Option<Format>,
    /// The matrices of the vision tower's layers.
    pub vision: Option<Format>,
}

impl Recipe {
    /// Nothing packed.
    pub const DENSE: Self = Self { decoder: None, embedding: None, head: None, projector: None, vision: None };

    /// What `bits` means where nothing else is asked for: the decoder's layers in that many, and all else in 8, which loses next to
    /// nothing.
    ///
    /// # Errors
    /// If there are no such formats.
    pub fn of_bits(bits: usize, group: usize) -> Result<Self> {
        let eight = Some(Format::new(8, group, false)?);
        Ok(Self { decoder: Some(Format::new(bits, group, false)?), embedding: eight, head: eight, projector: eight, vision: eight })
    }

    /// How the matrix `[_, k]` of the module of this canonical name is packed: in groups that divide its rows; none if it stays dense.
    pub fn format(&self, module: &str, k: usize) -> Option<Format> {
        let asked = match Part::of(module)? {
            Part::Llama if module == "llama.embed_tokens" => self.embedding,
            Part::Llama if module == "llama.lm_head" => self.head,
            Part::Llama if module.starts_with("llama.layers.") => self.decoder,
            Part::Projector => self.projector,
            Part::Clip if module.starts_with("clip.layers.") => self.vision,
            _ => None,
        }?;
        let group = GROUPS.into_iter().rev().find(|group| *group <= asked.group && k.is_multiple_of(*group))?;
        Some(Format { group, ..asked })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_apart_and_groups_divide_rows() {
        let recipe = Recipe { vision: None, ..Recipe::of_bits(4, 128).unwrap() };
        let of = |module, k| recipe.format(module, k).map(|f| (f.bits, f.group));
        assert_eq!(of("llama.layers.3.mlp.up_proj", 4096), Some((4, 128)));
        assert_eq!(of("llama.layers.3.mlp.up_proj", 192), Some((4, 64)));
        assert_eq!(of("llama.layers.3.mlp.up_proj", 96), Some((4, 32)));
        assert_eq!(of("llama.layers.3.mlp.up_proj", 100), None);
        assert_eq!(of("llama.lm_head", 4096), Some((8, 128)));
        assert_eq!(of("projector.linear_1", 1024), Some((8, 128)));
        assert_eq!(of("llama.embed_tokens", 4096), Some((8, 128)));
        for module in ["llama.norm", "clip.layers.0.mlp.fc1", "clip.patch_embedding", "image_newline"] {
            assert_eq!(of(module, 1024), None, "{module}");
        }
        assert!(Recipe::of_bits(5, 128).is_err() && Recipe::of_bits(4, 100).is_err());
    }
}
