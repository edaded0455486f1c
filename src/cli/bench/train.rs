//! `bench --train`: steps of training, over rows that are made up.

use std::time::Instant;

use llava_engine::device::Device;
use llava_engine::engine::open_grad_device;
use llava_engine::error::{Error, Result};
use llava_engine::model::Slot;
use llava_engine::model::checkpoint::{Beside, Checkpoint};
use llava_engine::model::config::LlavaConfig;
use llava_engine::profile::{OpRecord, Profiled};
use llava_engine::train::config::{Config, SETTINGS};
use llava_engine::train::trial::Trial;
use llava_engine::weights::hub::resolve;
use llava_engine::weights::random::Random;

use super::measure::{Phase, Probed, Run, made_up_pixels, made_up_prompt, made_up_token, say, so_far};
use super::{About, Args, Weights, shape};

/// The settings that `--train` says, over those of a preset.
fn settings(said: &[String]) -> Result<Config> {
    let mut table = toml::Table::new();
    for setting in said {
        let known = setting.split_once('=').and_then(|(key, value)| Some((SETTINGS.iter().find(|s| s.key == key)?, value)));
        let Some((known, value)) = known else {
            return Err(Error::usage(format!(
                "--train `{setting}`: say KEY=VALUE, with the key of a setting of finetune, such as tune=lora"
            )));
        };
        let value = (known.parse)(&[value]).map_err(|e| Error::usage(format!("--train {setting}: {e}")))?;
        table.insert(known.key.to_owned(), value);
    }
    Config::resolve(None, table)
}

/// A prompt of `n` tokens with all of a picture.
fn prompt_of_picture(n: usize, config: &LlavaConfig) -> Result<Vec<Slot>> {
    let of_picture = config.tokens_per_image();
    if n < of_picture {
        return Err(Error::usage(format!("--prompt-tokens {n}: a picture alone takes {of_picture} tokens of this model")));
    }
    Ok(made_up_prompt(n, config))
}

/// As many steps of each batch size as `args` say, after one that is not timed.
pub fn measure(args: &Args, device: Device, weights: Weights) -> Result<(About, Vec<Phase>)> {
    let start = Instant::now();
    let config = settings(&args.train)?;
    let computes = config.dtype.dtype();
    let (ops, note) = open_grad_device(device, args.threads, computes)?;
    note.iter().for_each(|note| eprintln!("llava-engine: {note}"));
    let ops = Profiled::new(ops);
    let (records, ops) = (ops.records(), Box::new(ops));
    let (name, prompt, mut trial) = match &args.model {
        Some(model) => {
            let checkpoint = Checkpoint::open(&resolve(&model.to_string_lossy())?, Beside { model_base: None, mmproj: None })?;
            let prompt = prompt_of_picture(args.prompt_tokens, &checkpoint.config)?;
            (model.display().to_string(), prompt, Trial::new(ops, config, &checkpoint.config, &checkpoint.weights)?)
        }
        None => {
            let (name, shape) = shape(args)?;
            let prompt = prompt_of_picture(args.prompt_tokens, &shape)?;
            (name.to_owned(), prompt, Trial::new(ops, config, &shape, &Random::packed(weights.dtype, weights.recipe))?)
        }
    };
    let about = About::new(name, trial.ops(), trial.model(), computes, start.elapsed().as_secs_f64() * 1e3);
    let length = args.prompt_tokens + args.new_tokens;
    let phase = |&n: &usize| Phase { name: "train", batch_size: n, tokens: n * length, context: length, runs: Vec::new() };
    let mut phases: Vec<_> = args.batch_size.iter().map(phase).collect();
    for phase in &mut phases {
        let config = trial.model().config();
        let answer: Vec<u32> = (0..args.new_tokens).map(|i| made_up_token(i, config)).collect();
        let mut rows = trial.rows(made_up_pixels(phase.batch_size, config), &prompt, &answer)?;
        trial.step(&mut rows)?;
        let mut probed = Probed::new(trial.ops())?;
        for i in 0..args.repeat {
            say(&format!("{} rows, step {} of {}", phase.batch_size, i + 1, args.repeat));
            let before = so_far(&records);
            let start = Instant::now();
            trial.step(&mut rows)?;
            let ms = start.elapsed().as_secs_f64() * 1e3;
            // FLOPs without what is computed again; bytes of all that was done.
            let work =
                OpRecord { flops: trial.flops(&rows), packed_flops: 0.0, stored_bytes: 0.0, ..so_far(&records).since(before) };
            phase.runs.push(Run { ms, work, peaks: probed.of_run(trial.ops())? });
        }
    }
    Ok((about, phases))
}
