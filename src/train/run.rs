//! [`Trainer`]: a run, step by step, on the CPU.

use std::path::Path;
use std::time::Instant;

use super::config::{AspectRatio, Config, Precision, Tune, TuneVision};
use super::data::{Dataset, length_in_words};
use super::lora;
use super::mask::Masker;
use super::optim::Optimizer;
use super::sampler::{Grouping, Length, Order, Position, Sampler};
use super::schedule::Schedule;
use crate::cpu::Cpu;
use crate::data::{Row, RowError};
use crate::dtype::DType;
use crate::engine::Example;
use crate::error::{Error, Result};
use crate::image::{CHANNELS, Fit, Preprocess, RgbImage};
use crate::model::checkpoint::Checkpoint;
use crate::model::{Batch, Llava, Recompute, Slot, Tape, Trained, save};
use crate::ops::Ops;

/// A model that is being trained, and what it is trained by.
pub struct Trainer<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    masker: Masker<'a>,
    data: Dataset,
    ops: Cpu,
    model: Llava,
    trained: Trained,
    recompute: Recompute,
    /// None before the first batch; made anew for a larger one.
    tape: Option<Tape>,
    preprocess: Preprocess,
    sampler: Sampler,
    schedule: Schedule,
    optimizer: Optimizer,
    n_steps: usize,
    n_done: usize,
    bad_rows: BadRows,
}

/// Rows that were left out.
struct BadRows {
    /// How many there may be.
    max: usize,
    /// Number in the set of each, and what is wrong with it, in the order in which they were met.
    found: Vec<(usize, String)>,
}

impl BadRows {
    /// What is made of row `index`; none if that failed and is put up with.
    fn left_out<T>(&mut self, index: usize, result: Result<T>) -> Result<Option<T>> {
        let error = match result {
            Ok(value) => return Ok(Some(value)),
            Err(e) => e,
        };
        if self.found.iter().any(|(known, _)| *known == index) {
            return Ok(None);
        }
        if self.found.len() == self.max {
            return Err(error);
        }
        self.found.push((index, error.to_string()));
        Ok(None)
    }
}

/// What a step was.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Step {
    /// Its number, counted from 1.
    pub step: usize,
    /// Steps of the run.
    pub n_steps: usize,
    /// Mean over its batches of the mean loss of their tokens, in nats.
    pub loss: f64,
    /// Learning rate of it.
    pub lr: f64,
    /// Norm of all gradients before they were cut down.
    pub grad_norm: f64,
    /// Positions, those of pictures among them.
    pub n_tokens: usize,
    /// Tokens that were learned.
    pub n_learned: usize,
    /// How long it took, in ms.
    pub ms: f64,
}

impl<'a> Trainer<'a> {
    /// Loads the model; `max_bad_rows` rows that cannot be used are left out, one more is an error.
    ///
    /// # Errors
    /// If the settings ask for what this version cannot do, by name; if the model cannot be loaded or trained; if there is nothing to do.
    pub fn new(
        config: &'a Config,
        checkpoint: &'a Checkpoint,
        masker: Masker<'a>,
        data: Dataset,
        n_threads: usize,
        max_bad_rows: usize,
    ) -> Result<Self> {
        if !config.has_lora() {
            checkpoint.expect_unpacked()?;
        }
        let (trained, recompute) = supported(config)?;
        let mut bad_rows = BadRows { max: max_bad_rows, found: Vec::new() };
        let lengths = lengths(config, &masker, &data, &mut bad_rows)?;
        let order = Order {
            seed: config.seed,
            grouping: config.grouping,
            batch_size: config.batch_size as usize,
            n_accumulated: config.accumulation as usize,
            pack_tokens: if config.pack_tokens > 0 { config.pack_tokens } else { config.max_tokens } as usize,
        };
        let sampler = Sampler::new(order, lengths, Position::default());
        let of_epochs = (config.epochs * sampler.steps_per_epoch() as f64).ceil() as usize;
        let n_steps = if config.max_steps > 0 { of_epochs.min(config.max_steps as usize) } else { of_epochs };
        if n_steps == 0 {
            return Err(Error::usage("there is no step to make: no rows, or no epochs"));
        }
        if config.save_steps > 0 && (config.save_steps as usize) < n_steps {
            return refuse("saving before the end", "save_steps = 0");
        }
        let ops = Cpu::new(n_threads, DType::F32)?;
        let mut model = lora::load(&ops, config, checkpoint)?;
        model.train(
            &ops,
            Trained { vision: config.tune_vision == TuneVision::Full, decoder: config.tune == Tune::Full, ..trained },
        )?;
        let mut preprocess = checkpoint.config.preprocess.clone();
        match config.image_aspect_ratio {
            Some(AspectRatio::Pad) => preprocess.fit = Fit::Pad,
            Some(AspectRatio::Square) => preprocess.fit = Fit::Crop,
            None => {}
        }
        Ok(Self {
            schedule: Schedule::new(config.schedule, n_steps, config.warmup_steps as usize, config.warmup_ratio),
            optimizer: Optimizer::new(config),
            config,
            checkpoint,
            masker,
            data,
            ops,
            model,
            trained,
            recompute,
            tape: None,
            preprocess,
            sampler,
            n_steps,
            n_done: 0,
            bad_rows,
        })
    }

    /// Makes a step; none after the last.
    ///
    /// The gradients are those of the mean over the step's batches of the mean loss of their tokens, as in LLaVA's own trainer.
    ///
    /// # Errors
    /// If a row cannot be used and no more are put up with; if a gradient is not finite. The model is that of the step before.
    pub fn step(&mut self) -> Result<Option<Step>> {
        if self.n_done == self.n_steps {
            return Ok(None);
        }
        let start = Instant::now();
        let mut done = Step {
            step: self.n_done + 1,
            n_steps: self.n_steps,
            loss: 0.0,
            lr: self.lr() * self.schedule.factor(self.n_done),
            grad_norm: 0.0,
            n_tokens: 0,
            n_learned: 0,
            ms: 0.0,
        };
        let batches = self.sampler.next_step();
        for (i, rows) in batches.iter().enumerate() {
            self.model.set_pass(Some((self.n_done * self.config.accumulation as usize + i) as u64));
            self.learn(rows, batches.len(), &mut done)?;
        }
        done.grad_norm = self.optimizer.step(&self.ops, &mut self.model, self.schedule.factor(self.n_done))?;
        self.n_done += 1;
        done.ms = start.elapsed().as_secs_f64() * 1e3;
        Ok(Some(done))
    }

    /// The learning rate of what learns the most: the decoder, or else the projector.
    fn lr(&self) -> f64 {
        if self.trained.decoder { self.config.lr } else { self.config.projector_lr.unwrap_or(self.config.lr) }
    }

    /// What is wrong with each row that was left out so far, in the order in which they were met.
    pub fn bad_rows(&self) -> impl Iterator<Item = &str> {
        self.bad_rows.found.iter().map(|(_, problem)| problem.as_str())
    }

    /// Adds the gradients of a batch of rows.
    fn learn(&mut self, rows: &[usize], n_batches: usize, done: &mut Step) -> Result<()> {
        let mut images: Vec<RgbImage> = Vec::new();
        let (mut slots, mut is_learned, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for &index in rows {
            let read = self.data.row(index).and_then(|row| Ok((self.masker.example(&row)?.example, row)));
            let loaded = read.map_err(|e| e.error).and_then(|(example, row)| Ok((example, row.load_images()?)));
            let Some((example, pictures)) = self.bad_rows.left_out(index, loaded)? else { continue };
            let first_feature = images.len() * self.masker.tokens_per_image;
            let Example { slots: of_row, is_answer } = example;
            lengths.push(of_row.len());
            slots.extend(of_row.into_iter().map(|slot| match slot {
                Slot::Image { feature_row } => Slot::Image { feature_row: first_feature + feature_row },
                token => token,
            }));
            is_learned.extend(is_answer);
            images.extend(pictures);
        }
        let n_learned = is_learned.iter().filter(|is| **is).count();
        if n_learned == 0 {
            return Ok(());
        }
        let pixels = if images.is_empty() {
            None
        } else {
            let side = self.preprocess.crop_size;
            let mut pixels = self.ops.alloc(&[images.len(), CHANNELS, side, side], DType::F32)?;
            self.ops.preprocess(&mut pixels, &images, &self.preprocess)?;
            Some(pixels)
        };
        if self.tape.as_ref().is_none_or(|tape| !tape.holds(slots.len(), images.len())) {
            let (config, trained) = (&self.checkpoint.config, self.trained);
            self.tape = None; // before the next takes memory
            self.tape = Some(Tape::plan(&self.ops, config, trained, slots.len(), images.len(), self.recompute)?);
        }
        let tape = self.tape.as_mut().expect("it was just made");
        let batch = Batch { slots: &slots, is_learned: &is_learned, lengths: &lengths };
        let scale = 1.0 / (n_learned * n_batches) as f64;
        let sum = self.model.gradients(&self.ops, tape, pixels.as_ref(), &batch, scale as f32)?;
        done.loss += sum * scale;
        done.n_tokens += slots.len();
        done.n_learned += n_learned;
        Ok(())
    }

    /// Writes the model into the folder `output`, in the layout and the dtypes of the checkpoint from the folder `model` that it was; of LoRA
    /// what is over that ([`lora::save`]).
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn save(&mut self, model: &Path, output: &Path) -> Result<()> {
        let mut learned = self.model.learned(&self.ops)?;
        if self.config.has_lora() {
            return lora::save(self.config, self.checkpoint, learned, model, output);
        }
        save::rewrite(model, self.checkpoint, output, |canonical, _| Ok(learned.remove(canonical)))?;
        assert!(learned.is_empty(), "learned, but of no file: {:?}", learned.keys());
        Ok(())
    }
}

/// Settings that this version has no code for.
fn refuse<T>(what: &str, instead: &str) -> Result<T> {
    Err(Error::Unsupported(format!("{what} is not there yet: take {instead}")))
}

/// What is to be trained and what is computed again, if this version can do what the settings ask for.
fn supported(config: &Config) -> Result<(Trained, Recompute)> {
    let (vision, decoder) = (config.tune_vision != TuneVision::Off, config.tune != Tune::Projector);
    if config.dtype != Precision::F32 {
        return refuse("training in 16 bits", "dtype = \"f32\"");
    }
    if !config.eval_data.is_empty() || config.eval_share > 0.0 {
        return refuse("evaluation between steps", "no eval_data and eval_share = 0");
    }
    let recompute = match config.recompute {
        super::config::Recompute::None => return refuse("recompute = \"none\"", "recompute = \"selective\""),
        super::config::Recompute::Selective => Recompute::Selective,
        super::config::Recompute::Full => Recompute::Full,
    };
    Ok((Trained { vision, projector: true, decoder }, recompute))
}

/// How long each row is, for their order: in tokens if they are packed, else in words.
fn lengths(config: &Config, masker: &Masker<'_>, data: &Dataset, bad_rows: &mut BadRows) -> Result<Vec<Length>> {
    let length = |row: Row| match config.grouping {
        Grouping::Packed => {
            let has_images = !row.images.is_empty();
            Ok(Length { n: masker.example(&row)?.example.slots.len(), has_images })
        }
        Grouping::None | Grouping::Modality => Ok(length_in_words(&row)),
    };
    let mut lengths = Vec::with_capacity(data.n_rows());
    for index in 0..data.n_rows() {
        let of_row = data.row(index).and_then(length).map_err(|e: RowError| e.error);
        lengths.push(bad_rows.left_out(index, of_row)?.unwrap_or(Length { n: 1, has_images: false }));
    }
    Ok(lengths)
}
