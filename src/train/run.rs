//! [`Trainer`]: a run, step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::checkpoint::{self, Place};

use super::config::{AspectRatio, Config, Tune, TuneVision};
use super::data::Dataset;
use super::flops::{Size, model_flops};
use super::lora;
use super::mask::Masker;
use super::optim::Optimizer;
use super::rows::{Loaded, Rows, lengths};
use super::sampler::{Grouping, Length, Order, Position, Sampler};
use super::schedule::Schedule;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::image::{CHANNELS, Fit, Preprocess};
use crate::model::checkpoint::Checkpoint;
use crate::model::{Llava, Recompute, Tape, Trained, save};
use crate::ops::GradOps;
use crate::tensor::Tensor;
use crate::weights::names::{Dialect, Part};
use crate::weights::torch_write;

/// A model that is being trained, and what it is trained by.
pub struct Trainer<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    masker: Masker<'a>,
    rows: Rows,
    /// Those to evaluate by.
    eval_rows: Option<Rows>,
    ops: Box<dyn GradOps>,
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
    /// What rows and model are known by.
    fingerprints: [String; 2],
}

/// What a step was.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Step {
    /// Its number, counted from 1.
    pub step: usize,
    /// Steps of the run.
    pub n_steps: usize,
    /// Mean over its batches of the mean loss of their tokens, in nats.
    pub loss: f64,
    /// Learning rate of it.
    pub lr: f64,
    /// Norm of all gradients before they were cut down; 0 if the step was skipped.
    pub grad_norm: f64,
    /// What the loss was multiplied by, in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    /// Whether that was too much for gradients, so that nothing was learned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_skipped: bool,
    /// Positions, those of pictures among them.
    pub n_tokens: usize,
    /// Tokens that were learned.
    pub n_learned: usize,
    /// What its arithmetic comes to ([`model_flops`]), in TFLOP.
    pub tflop: f64,
    /// How long it took, in ms.
    pub ms: f64,
}

impl<'a> Trainer<'a> {
    /// Loads the model onto a device that was opened for the dtype of the settings; `max_bad_rows` rows that cannot be used are left out, one more is an error. As many of those to evaluate by.
    ///
    /// # Errors
    /// If the model cannot be loaded, or not be trained so; if there is nothing to do.
    pub fn new(
        config: &'a Config,
        checkpoint: &'a Checkpoint,
        masker: Masker<'a>,
        data: Dataset,
        ops: Box<dyn GradOps>,
        max_bad_rows: usize,
    ) -> Result<Self> {
        if !config.has_lora() {
            checkpoint.expect_unpacked()?;
        }
        let (trained, recompute) = passes(config);
        let of_rows = checkpoint::fingerprint(data.hashes());
        let (mut rows, mut eval_rows) = Rows::split(config, data, max_bad_rows)?;
        eval_rows.as_mut().map_or(Ok(()), |rows| rows.check(&masker))?;
        let lengths = lengths(config, &masker, &mut rows)?;
        let (sampler, n_steps) = course(config, lengths)?;
        let mut model = lora::begin(&*ops, config, &checkpoint.config, &checkpoint.weights)?;
        model.train(&*ops, trained_whole(config), config.dtype.dtype())?;
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
            rows,
            eval_rows,
            ops,
            model,
            trained,
            recompute,
            tape: None,
            preprocess,
            sampler,
            n_steps,
            n_done: 0,
            fingerprints: [of_rows, of_model(checkpoint)?],
        })
    }

    /// Whether no step of the run moves anything: one that is all warm-up begins and ends with a rate of 0.
    pub fn is_idle(&self) -> bool {
        (0..self.n_steps).all(|step| self.schedule.factor(step) == 0.0)
    }

    /// Steps that are done, and those of the run.
    pub fn progress(&self) -> (usize, usize) {
        (self.n_done, self.n_steps)
    }

    /// The most that the device does at a time in the run's dtype, measured now, in TFLOP a ms; NaN if it has no measure.
    ///
    /// # Errors
    /// If the device fails.
    pub fn measure_peak(&self) -> Result<f64> {
        Ok(self.ops.measure_peaks()?.limit_gflops(self.config.dtype.dtype()).map_or(f64::NAN, |gflops| gflops / 1e6))
    }

    /// Writes a checkpoint of the step that was just made into the folder `output`.
    ///
    /// # Errors
    /// As [`checkpoint::write`].
    pub fn checkpoint(&mut self, output: &Path) -> Result<()> {
        let [rows, model] = self.fingerprints.clone();
        let place = Place {
            step: self.n_done,
            n_steps: self.n_steps,
            position: self.sampler.position(),
            n_updates: self.optimizer.n_steps(),
            loss_scale: self.optimizer.loss_scale(),
            bad_rows: self.rows.bad.clone(),
            rows,
            model,
        };
        let keep = self.config.keep as usize;
        checkpoint::write(output, keep, self.config, place, &*self.ops, &mut self.model, &self.optimizer)
    }

    /// Goes on where the newest whole checkpoint in the folder `output` was written, if there is one; what is wrong with newer ones goes to
    /// `note`.
    ///
    /// # Errors
    /// If that is the checkpoint of another run; the message says what differs.
    pub fn resume(&mut self, output: &Path, note: &mut dyn FnMut(&str)) -> Result<()> {
        let Some(found) = checkpoint::newest(output, note)? else { return Ok(()) };
        let mut differences = self.config.differences(&found.config, MAY_DIFFER);
        let Place { step, n_steps, position, bad_rows, rows, model, .. } = &found.place;
        let [of_rows, of_model] = &self.fingerprints;
        let others =
            [("other rows", rows != of_rows), ("another model", model != of_model), ("other steps", *n_steps != self.n_steps)];
        // Those that follow from a setting that differs need no word of their own.
        let is_explained = !differences.is_empty();
        differences.extend(others.iter().filter(|(_, differs)| *differs && !is_explained).map(|(what, _)| (*what).to_owned()));
        if !differences.is_empty() {
            let step = format!("the checkpoint of step {step} is of another run ({})", differences.join("; "));
            return Err(Error::file(output, step + ": go on with the settings that it has, or begin anew in a new folder"));
        }
        found.restore(&*self.ops, &mut self.model, &mut self.optimizer)?;
        self.sampler.go_to(*position);
        self.rows.bad.clone_from(bad_rows);
        self.n_done = *step;
        Ok(())
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
            loss_scale: self.loss_scale(),
            is_skipped: false,
            n_tokens: 0,
            n_learned: 0,
            tflop: 0.0,
            ms: 0.0,
        };
        let position = self.sampler.position();
        if let Err(e) = self.make(&mut done) {
            self.sampler.go_to(position); // so that a checkpoint is one of the step before
            return Err(e);
        }
        self.n_done += 1;
        done.ms = start.elapsed().as_secs_f64() * 1e3;
        Ok(Some(done))
    }

    /// Makes the next step, and says what it was.
    fn make(&mut self, done: &mut Step) -> Result<()> {
        let batches = self.sampler.next_step();
        let mut n_used = 0;
        for (i, rows) in batches.iter().enumerate() {
            self.model.set_pass(Some((self.n_done * self.config.accumulation as usize + i) as u64));
            let used = self.learn(rows, batches.len(), done).map_err(|e| e.within(format_args!("step {}", done.step)))?;
            n_used += usize::from(used);
        }
        // The mean is over batches that had something to learn.
        if 0 < n_used && n_used < batches.len() {
            let factor = batches.len() as f64 / n_used as f64;
            done.loss *= factor;
            let ops = &*self.ops;
            self.model.visit_params(&mut |param| ops.scale(param.grad, factor as f32))?;
        }
        self.model.set_pass(None);
        // Where no row could be used there are no gradients, and moments alone would move the parameters.
        if done.n_learned > 0 {
            let updated = self.optimizer.step(&*self.ops, &mut self.model, self.schedule.factor(self.n_done));
            let norm = updated.map_err(|e| e.within(format_args!("step {}", done.step)))?;
            (done.grad_norm, done.is_skipped) = (norm.unwrap_or(0.0), norm.is_none());
        }
        Ok(())
    }

    /// The learning rate of what learns the most: the decoder, or else the projector.
    fn lr(&self) -> f64 {
        if self.trained.decoder { self.config.lr } else { self.config.projector_lr.unwrap_or(self.config.lr) }
    }

    /// What the loss is multiplied by before gradients are made of it, in f16.
    fn loss_scale(&self) -> Option<f32> {
        self.optimizer.loss_scale().map(|scale| scale.value())
    }

    /// What is wrong with each row that was left out so far, in the order in which they were met.
    pub fn bad_rows(&self) -> impl Iterator<Item = &str> {
        self.rows.bad.iter().map(|(_, problem)| problem.as_str())
    }

    /// The same of rows to evaluate by.
    pub fn bad_eval_rows(&self) -> impl Iterator<Item = &str> {
        self.eval_rows.iter().flat_map(|rows| &rows.bad).map(|(_, problem)| problem.as_str())
    }

    /// The mean loss of all tokens to be learned in the rows to evaluate by, in nats; none if there are none, or when `stop` is set.
    ///
    /// # Errors
    /// If too many rows cannot be used.
    pub fn evaluate(&mut self, stop: &AtomicBool) -> Result<Option<f64>> {
        let Some(mut rows) = self.eval_rows.take() else { return Ok(None) };
        let loss = self.loss_of(&mut rows, stop);
        self.eval_rows = Some(rows);
        loss
    }

    fn loss_of(&mut self, rows: &mut Rows, stop: &AtomicBool) -> Result<Option<f64>> {
        let indices: Vec<usize> = (0..rows.data.n_rows()).collect();
        let (mut sum, mut n_learned) = (0.0, 0);
        for indices in indices.chunks(rows_at_once(self.config)) {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let loaded = rows.load(&self.masker, indices)?;
            let n = loaded.is_learned.iter().filter(|is| **is).count();
            if n == 0 {
                continue;
            }
            n_learned += n;
            let pixels = self.prepare(&loaded)?;
            let tape = self.tape.as_mut().expect("it was just prepared");
            sum += self.model.loss(&*self.ops, tape, pixels.as_ref(), &loaded.batch())?;
        }
        Ok((n_learned > 0).then_some(sum / n_learned as f64))
    }

    /// Makes room for a pass over these rows, and pixels of their pictures.
    fn prepare(&mut self, loaded: &Loaded) -> Result<Option<Tensor>> {
        let n_images = loaded.images.len();
        let had = self.tape.as_ref().map_or((0, 0), Tape::room);
        let needed = (had.0.max(loaded.slots.len()), had.1.max(n_images));
        if self.tape.is_none() || needed != had {
            let (config, trained) = (&self.checkpoint.config, self.trained);
            self.tape = None; // before the next takes memory
            self.tape = Some(Tape::plan(&*self.ops, config, trained, needed.0, needed.1, self.recompute)?);
        }
        if n_images == 0 {
            return Ok(None);
        }
        let side = self.preprocess.crop_size;
        let mut pixels = self.ops.alloc(&[n_images, CHANNELS, side, side], DType::F32)?;
        self.ops.preprocess(&mut pixels, &loaded.images, &self.preprocess)?;
        Ok(Some(pixels))
    }

    /// Adds the gradients of a batch of rows, if there is something to learn in them.
    fn learn(&mut self, rows: &[usize], n_batches: usize, done: &mut Step) -> Result<bool> {
        let loaded = self.rows.load(&self.masker, rows)?;
        let n_learned = loaded.is_learned.iter().filter(|is| **is).count();
        if n_learned == 0 {
            return Ok(false);
        }
        let pixels = self.prepare(&loaded)?;
        let tape = self.tape.as_mut().expect("it was just prepared");
        let scale = 1.0 / (n_learned * n_batches) as f64;
        let of_gradients = scale * f64::from(done.loss_scale.unwrap_or(1.0));
        let sum = self.model.gradients(&*self.ops, tape, pixels.as_ref(), &loaded.batch(), of_gradients as f32)?;
        done.loss += sum * scale;
        done.n_tokens += loaded.slots.len();
        done.n_learned += n_learned;
        let size = Size { n_images: loaded.images.len(), lengths: loaded.lengths, n_learned };
        let (config, model) = (self.config, &self.checkpoint.config);
        done.tflop += model_flops(model, trained_whole(config), lora::n_added(config, model), &size) / 1e12;
        Ok(true)
    }

    /// Writes the model into the folder `output`, in the layout and the dtypes of the checkpoint from the folder `model` that it was; of LoRA
    /// what is over that ([`lora::save`]).
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn save(&mut self, model: &Path, output: &Path) -> Result<()> {
        if self.config.has_lora() {
            let mut learned = BTreeMap::new();
            self.model.visit_learned(&*self.ops, &mut |name, tensor| {
                learned.insert(name.to_owned(), tensor);
                Ok(())
            })?;
            return lora::save(self.config, self.checkpoint, learned, model, output);
        }
        let mut rewrite = save::Rewrite::begin(self.checkpoint, output)?;
        let mut projector = Vec::new();
        self.model.visit_learned(&*self.ops, &mut |name, tensor| {
            rewrite.put(name, &tensor)?;
            if name.starts_with("projector.") {
                projector.push((lora::spelling(self.checkpoint, name, Dialect::Original), tensor));
            }
            Ok(())
        })?;
        // What LLaVA's own first stage leaves, for its second.
        if self.config.tune == Tune::Projector && !projector.is_empty() {
            torch_write::write(&output.join("mm_projector.bin"), &projector)?;
        }
        rewrite.finish(model, output)
    }
}

/// Rows that are evaluated at once: no more than are learnt at once.
pub(super) fn rows_at_once(config: &Config) -> usize {
    if config.grouping == Grouping::Packed { 1 } else { config.batch_size as usize }
}

/// Batches in the order of the run, and how many steps it has.
///
/// # Errors
/// If it has none.
pub(super) fn course(config: &Config, lengths: Vec<Length>) -> Result<(Sampler, usize)> {
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
    Ok((sampler, n_steps))
}

/// Settings that have no influence on the result: a run may go on with others.
const MAY_DIFFER: &[&str] =
    &["preset", "data", "image_folder", "output", "recompute", "log_steps", "save_steps", "keep", "eval_data", "eval_steps"];

/// What the files of a model are known by: their sizes, and some pages from all over them.
fn of_model(checkpoint: &Checkpoint) -> Result<String> {
    const PAGES: u64 = 64;
    let files: BTreeSet<_> = checkpoint.weights.entries().map(|entry| entry.file).collect();
    let pages = |path: &Path| -> io::Result<Vec<u8>> {
        let (file, mut page) = (File::open(path)?, [0; 4096]);
        let size = file.metadata()?.len();
        let mut all = size.to_le_bytes().to_vec();
        for i in 0..PAGES {
            let n = file.read_at(&mut page, size / PAGES * i)?;
            all.extend(&page[..n]);
        }
        Ok(all)
    };
    let pages = files.iter().map(|path| pages(path).map_err(|e| Error::io(path, e))).collect::<Result<Vec<_>>>()?;
    Ok(checkpoint::fingerprint(pages))
}

/// What learns by itself, not by additions of low rank.
pub(super) fn trained_whole(config: &Config) -> Trained {
    Trained { vision: config.tune_vision == TuneVision::Full, projector: true, decoder: config.tune == Tune::Full }
}

/// Whether the tensor of this canonical name learns by itself.
pub(super) fn learns_whole(config: &Config, canonical: &str) -> bool {
    let Trained { vision, projector, decoder } = trained_whole(config);
    match Part::of(canonical) {
        Some(Part::Clip) => vision,
        Some(Part::Projector) => projector,
        Some(Part::Llama) => decoder,
        None => false,
    }
}

/// What gradients are made of, and what is computed again for them.
pub(super) fn passes(config: &Config) -> (Trained, Recompute) {
    let (vision, decoder) = (config.tune_vision != TuneVision::Off, config.tune != Tune::Projector);
    let recompute = match config.recompute {
        super::config::Recompute::None => Recompute::None,
        super::config::Recompute::Selective => Recompute::Selective,
        super::config::Recompute::Full => Recompute::Full,
    };
    (Trained { vision, projector: true, decoder }, recompute)
}
