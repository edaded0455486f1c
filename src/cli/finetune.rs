//! `finetune`: trains a model on rows of conversations, or looks through them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};
use llava_engine::data::Fault;
use llava_engine::device::Device;
use llava_engine::engine::open_grad_device;
use llava_engine::error::{Error, Result};
use llava_engine::model::checkpoint::{Beside, Checkpoint};
use llava_engine::model::config::Profile;
use llava_engine::model::{save, start};
use llava_engine::text::{Style, Template, Tokenizer};
use llava_engine::train::check::{Report, percentile};
use llava_engine::train::checkpoint::{self, Lock};
use llava_engine::train::config::{Config, Init, SETTINGS};
use llava_engine::train::data::Dataset;
use llava_engine::train::log::{Log, Row};
use llava_engine::train::mask::{Masker, Stretch};
use llava_engine::train::plan::Plan;
use llava_engine::train::run::{Step, Trainer};
use llava_engine::weights::adapter;
use llava_engine::weights::hub::resolve;
use serde_json::{Value, json};

use super::Outcome;
use super::common;

/// Flags of `finetune`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  llava-engine finetune --tune projector --lr 1e-3 --batch-size 4 --accumulation 1 --data rows.json --image-folder pictures --output tuned
  llava-engine finetune --config run.toml --output tuned --resume
  llava-engine finetune --init random --model shape --tune full --tune-vision full --config run.toml --output first
  llava-engine finetune --check-data --model llava-hf/llava-1.5-7b-hf --data llava_instruct_80k.json --image-folder coco/train2017
  llava-engine finetune --check-data --preset llava-1.5-pretrain --config run.toml --json

What a flag above says is said by a key of the same name in the file of --config as well (`lr = 2e-4`, `image_folder = \"coco\"`); a flag
counts more than the file, and the file more than the preset.")]
pub struct Args {
    /// Checkpoint folder or Hugging Face hub id; the demo model if absent
    #[arg(long, short, env = "LLAVA_MODEL", alias = "model-path", value_name = "PATH|HF_ID")]
    model: Option<PathBuf>,
    /// Language model that an mm_projector.bin belongs to
    #[arg(long, env = "LLAVA_MODEL_BASE", value_name = "PATH")]
    model_base: Option<PathBuf>,
    /// File of settings, TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Goes on with the run whose checkpoints are in --output, if there are any
    #[arg(long)]
    resume: bool,
    /// With --resume: makes no more steps, and writes the model as it is by now
    #[arg(long, requires = "resume")]
    write_now: bool,
    /// Says what memory, steps and arithmetic the run will take, and trains nothing
    #[arg(long, conflicts_with = "check_data")]
    plan: bool,
    /// Looks through the data and trains nothing: shows the first rows with what is learnt of them, counts and names the bad ones
    #[arg(long)]
    check_data: bool,
    /// Rows that --check-data shows
    #[arg(long, default_value_t = 3, value_name = "N")]
    show_rows: usize,
    /// Bad rows that are put up with
    #[arg(long, default_value_t = 0, value_name = "N")]
    max_bad_rows: usize,
    /// Decodes every picture, not only its header; slow
    #[arg(long)]
    decode_images: bool,
    /// Where it runs: auto, cpu, cuda, cuda:N, or sim (the CUDA kernels simulated; slow)
    #[arg(long, env = "LLAVA_DEVICE", default_value = "auto")]
    device: String,
    /// CPU threads; 0 for as many as the machine has
    #[arg(long, default_value_t = 0, env = "LLAVA_THREADS", value_name = "N")]
    threads: usize,
    /// Prints one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: Settings,
}

/// The settings that were given as flags.
struct Settings(toml::Table);

impl clap::Args for Settings {
    fn augment_args(command: Command) -> Command {
        command.args(SETTINGS.iter().map(|setting| {
            let arg = Arg::new(setting.key).long(setting.key.replace('_', "-")).value_name(setting.value_name).help(setting.help);
            arg.action(ArgAction::Append).allow_negative_numbers(true).help_heading("Settings")
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut table = toml::Table::new();
        for setting in SETTINGS {
            let Some(values) = matches.get_many::<String>(setting.key) else { continue };
            let values: Vec<&str> = values.map(String::as_str).collect();
            let flag = setting.key.replace('_', "-");
            let fail = |e| clap::Error::raw(clap::error::ErrorKind::ValueValidation, format!("--{flag}: {e}\n"));
            table.insert(setting.key.to_owned(), (setting.parse)(&values).map_err(fail)?);
        }
        Ok(Self(table))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.extend(Self::from_arg_matches(matches)?.0);
        Ok(())
    }
}

/// Trains, or looks through the data.
pub fn run(args: &Args) -> Result<Outcome> {
    let device = args.device.parse::<Device>()?;
    let config = Config::resolve(args.config.as_deref(), args.settings.0.clone())?;
    let output = match (args.check_data || args.plan, config.output.as_deref()) {
        (false, None) => return Err(Error::usage("where is the result to go? Name a new folder with --output")),
        (true, _) => None,
        (false, output) => output,
    };
    let data = Dataset::open(&config.data, config.image_folder.as_deref())?;
    let model = args.model.clone().map_or_else(common::demo_model, Ok)?;
    let folder = resolve(&model.to_string_lossy())?;
    let beside = Beside { model_base: args.model_base.as_deref(), mmproj: None };
    if let (Init::Random, Some(output)) = (config.init, output) {
        // What needs no weights comes before they are drawn.
        if args.resume && output.join(result_name(&config)).exists() {
            return complete(args, output);
        }
        if !args.resume && output.exists() {
            save::new_folder(output)?;
        }
    }
    // Weights that are drawn need a file for as long as the run takes; one that goes on draws the same again.
    let start =
        (config.init == Init::Random).then(tempfile::tempdir).transpose().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let folder = match &start {
        Some(start) => {
            let start = start.path().join("start");
            start::write(&folder, output.map(|_| config.seed), &start)?;
            start
        }
        None => folder,
    };
    let checkpoint = Checkpoint::open(&folder, beside)?;
    let tokenizer = match &checkpoint.gguf {
        Some(gguf) => Tokenizer::from_gguf(&gguf.path, &gguf.keys)?,
        None => Tokenizer::open(&checkpoint.tokenizer_dir)?,
    };
    let (style, own) = match checkpoint.config.profile {
        Profile::Hf => (Style::Hf, "hf"),
        Profile::Original => (Style::Original, "v1"),
    };
    let masker = Masker {
        tokenizer: &tokenizer,
        style,
        template: config.template()?.map_or_else(|| Template::by_name(own), Ok)?,
        tokens_per_image: checkpoint.config.tokens_per_image(),
        // What is longer than the model can hold is cut off.
        max_tokens: (config.max_tokens as usize).min(checkpoint.config.context_tokens),
    };
    if let Some(output) = output {
        return train(args, device, &config, &folder, output, &checkpoint, masker, data);
    }
    if args.plan {
        let plan = Plan::of(&config, &checkpoint, &masker, data, args.max_bad_rows)?;
        let program = common::memory("VmRSS").unwrap_or(0);
        match args.json {
            true => common::put_json(&json!({"plan": plan, "program_bytes": program, "bytes": plan.bytes() + program}))?,
            false => common::put(&plan_text(&plan, program))?,
        }
        return Ok(Outcome::Done);
    }
    let bar = common::progress("{msg:40} {wide_bar} {pos}/{len} {eta}");
    bar.set_length(data.n_rows() as u64);
    let colour = common::is_interactive() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let n_shown = if args.json { 0 } else { args.show_rows };
    let report = Report::of(&data, &masker, args.decode_images, n_shown, |shown| {
        bar.inc(1);
        let Some((row, stretches)) = shown else { return Ok(()) };
        let text = preview(&stretches, colour);
        bar.suspend(|| common::put(&format!("{}\n{text}\n\n", row.error(format_args!("template {}", masker.template.name())))))
    })?;
    bar.finish_and_clear();
    match args.json {
        true => common::put_json(&report_json(&report, &masker))?,
        false => common::put(&report_text(&report, masker.max_tokens))?,
    }
    if !args.json {
        let shown = report.bad_rows.iter().take(MAX_SHOWN);
        shown.for_each(|bad| eprintln!("llava-engine: {}", common::one_line(&bad.message)));
        if report.bad_rows.len() > MAX_SHOWN {
            eprintln!("llava-engine: and {} more bad rows: --json has them all", report.bad_rows.len() - MAX_SHOWN);
        }
    }
    report.judge(args.max_bad_rows)?;
    Ok(Outcome::Done)
}

/// Trains and writes the result. If it is stopped, it writes a checkpoint.
#[allow(clippy::too_many_arguments)] // what a run is made of, and where it goes
fn train(
    args: &Args,
    device: Device,
    config: &Config,
    folder: &Path,
    output: &Path,
    checkpoint: &Checkpoint,
    masker: Masker<'_>,
    data: Dataset,
) -> Result<Outcome> {
    let is_model = |a: &Path| std::fs::canonicalize(a).ok() == std::fs::canonicalize(folder).ok();
    if output.exists() && is_model(output) {
        return Err(Error::usage("--output is the model's own folder: name another"));
    }
    if args.resume && output.join(result_name(config)).exists() {
        return complete(args, output);
    }
    let (ops, note) = open_grad_device(device, args.threads, config.dtype.dtype())?;
    note.iter().for_each(|note| eprintln!("llava-engine: {note}"));
    let mut trainer = Trainer::new(config, checkpoint, masker, data, ops, args.max_bad_rows)?;
    if !args.resume {
        save::new_folder(output)?;
    }
    std::fs::create_dir_all(output).map_err(|e| Error::io(output, e))?;
    let _lock = Lock::take(output)?;
    if args.resume {
        checkpoint::tidy(output)?;
        trainer.resume(output, &mut |note| eprintln!("llava-engine: {}", common::one_line(note)))?;
        match trainer.progress() {
            (0, _) if args.write_now => return Err(Error::file(output, "there is no checkpoint to write the model of")),
            (0, _) if !checkpoint::is_of_a_run(output)? => {
                return Err(Error::file(output, "is not empty, and no run of finetune was here: name another folder"));
            }
            (0, _) => eprintln!("llava-engine: there is no checkpoint in {}: beginning anew", output.display()),
            (step, n) => eprintln!("llava-engine: going on after step {step} of {n}"),
        }
    }
    if trainer.is_idle() {
        let advice = "take more epochs, a smaller --batch-size or --accumulation, or --warmup-ratio 0";
        eprintln!("llava-engine: nothing will be learned: the run is all warm-up, its rate 0 in every step: {advice}");
    }
    let stop = Arc::new(AtomicBool::new(args.write_now));
    common::cancel_on_ctrl_c(Arc::clone(&stop));
    let mut log = Log::open(output, trainer.progress().0)?;
    let result = steps(args, config, &mut trainer, &mut log, &stop, output).and_then(|()| {
        let (n_done, n_steps) = trainer.progress();
        if n_done < n_steps && !args.write_now {
            return Ok(Outcome::Interrupted);
        }
        // A picture is no reason to lose a model.
        if let Err(e) = log.draw() {
            eprintln!("llava-engine: {}", common::one_line(&e.to_string()));
        }
        trainer.save(folder, output)?;
        Ok(Outcome::Done)
    });
    let (n_done, n_steps) = trainer.progress();
    match &result {
        // Numbers that are not finite must not take the place of good ones.
        Err(Error::Check { .. }) => {}
        Ok(Outcome::Interrupted) | Err(_) if n_done > 0 => {
            if let Err(e) = trainer.checkpoint(output) {
                eprintln!("llava-engine: no checkpoint of step {n_done}: {}", common::one_line(&e.to_string()));
                return result.and(Err(e));
            }
            eprintln!(
                "llava-engine: stopped after step {n_done} of {n_steps}: --resume goes on, --resume --write-now writes the model"
            );
        }
        _ => {}
    }
    let outcome = result?;
    if outcome == Outcome::Done {
        eprintln!("llava-engine: written to {}", output.display());
    }
    if args.json {
        let n_bad = trainer.bad_rows().chain(trainer.bad_eval_rows()).count();
        common::put_json(&summary(log.last(), n_bad, output))?;
    }
    Ok(outcome)
}

/// Makes the steps of a run, until it is stopped.
fn steps(args: &Args, config: &Config, trainer: &mut Trainer<'_>, log: &mut Log, stop: &AtomicBool, output: &Path) -> Result<()> {
    let say = |row: &str| eprintln!("llava-engine: left out: {}", common::one_line(row));
    // Those that the run knew when it was stopped have been named.
    let mut n_bad = if trainer.progress().0 > 0 { trainer.bad_rows().count() } else { 0 };
    let (mut n_bad_eval, mut peak, mut n_skipped) = (0, None, 0);
    while !stop.load(Ordering::Relaxed) {
        let Some(step) = trainer.step()? else { break };
        n_skipped += usize::from(step.is_skipped);
        trainer.bad_rows().skip(n_bad).for_each(say);
        n_bad = trainer.bad_rows().count();
        // Measuring takes a second or two.
        if peak.is_none() && (step.n_steps - step.step) as f64 * step.ms > LONG_MS {
            peak = Some(trainer.measure_peak()?);
        }
        let mfu = peak.map(|peak| step.tflop / step.ms / peak).filter(|share| share.is_finite());
        if !args.json && (step.step as u64).is_multiple_of(config.log_steps.max(1)) {
            common::put(&step_line(&step, mfu))?;
        }
        let (n, is_last) = (step.step as u64, step.step == step.n_steps);
        let is_evaluated = is_last || config.eval_steps > 0 && n.is_multiple_of(config.eval_steps);
        let eval_loss = if is_evaluated { trainer.evaluate(stop)? } else { None };
        trainer.bad_eval_rows().skip(n_bad_eval).for_each(say);
        n_bad_eval = trainer.bad_eval_rows().count();
        if let Some(loss) = eval_loss.filter(|_| !args.json) {
            common::put(&format!("step {n}: loss {loss:.4} of the rows to evaluate by\n"))?;
        }
        log.add(step, mfu, eval_loss)?;
        if !is_last && config.save_steps > 0 && n.is_multiple_of(config.save_steps) {
            trainer.checkpoint(output)?;
        }
    }
    if n_skipped > 0 {
        eprintln!("llava-engine: {n_skipped} steps taught nothing: their gradients were beyond f16 (--dtype bf16 has the range)");
    }
    Ok(())
}

/// Says that there is nothing to go on with: a run may have been killed when all was done.
fn complete(args: &Args, output: &Path) -> Result<Outcome> {
    let last = Log::last_of(output)?;
    let Some(Row { step: Step { step, n_steps, .. }, .. }) = &last else {
        return Err(Error::file(output, "holds a model, and no run of finetune was here: name another folder"));
    };
    drop(Lock::take(output)?); // that of a run that was killed goes
    let to_go_on = if step < n_steps { "; to go on, take it out of there" } else { "" };
    eprintln!("llava-engine: this run is complete: its model, of step {step} of {n_steps}, is in {}{to_go_on}", output.display());
    if args.json {
        common::put_json(&summary(last.as_ref(), 0, output))?;
    }
    Ok(Outcome::Done)
}

fn plan_text(plan: &Plan, program: usize) -> String {
    let Plan { n_rows, n_steps, n_tokens, n_trained, tflop, largest_batch: [tokens, images], memory } = plan;
    let mut out =
        format!("{n_rows} rows, {n_steps} steps, {n_tokens} tokens; the largest batch has {tokens}, with {images} pictures\n");
    out += &format!("{n_trained} parameters learn; {tflop:.3} TFLOP in all\n\n");
    let all = memory.iter().copied().chain([("the program", program), ("at most", plan.bytes() + program)]);
    all.for_each(|(what, bytes)| out += &format!("{what:<36} {:>10.1} MB\n", bytes as f64 / 1e6));
    out
}

/// A run this long is worth a measurement of what the device can do, in ms.
const LONG_MS: f64 = 60e3;

/// The file that a run writes last.
fn result_name(config: &Config) -> &'static str {
    if config.has_lora() { adapter::CONFIG } else { "config.json" }
}

fn summary(last_step: Option<&Row>, n_bad: usize, output: &Path) -> Value {
    let output = output.to_string_lossy();
    json!({"last_step": last_step, "left_out": n_bad, "output": output, "peak_memory_bytes": common::memory("VmHWM")})
}

fn step_line(step: &Step, mfu: Option<f64>) -> String {
    let Step { step, n_steps, loss, lr, grad_norm, loss_scale, is_skipped, n_tokens, ms, .. } = step;
    let left = (n_steps - step) as f64 * ms / 1e3;
    let speed = *n_tokens as f64 / ms * 1e3;
    let mfu = mfu.map_or(String::new(), |mfu| format!("MFU {:.0} %  ", 100.0 * mfu));
    let left = match left as u64 {
        s @ 0..100 => format!("{s} s"),
        s @ 100..6000 => format!("{} min", s / 60),
        s => format!("{:.1} h", s as f64 / 3600.0),
    };
    let norm = if *is_skipped { "skipped: gradients not finite".to_owned() } else { format!("grad norm {grad_norm:.3}") };
    let scale = loss_scale.map_or(String::new(), |scale| format!("loss scale {scale}  "));
    format!("step {step}/{n_steps}  loss {loss:.4}  lr {lr:.2e}  {norm}  {scale}{speed:.0} tokens/s  {mfu}{left} left\n")
}

/// Bad rows that are named one by one, for people.
const MAX_SHOWN: usize = 20;

/// A row's text: what is learnt is green where there are colours, else within `{{` and `}}`; what was cut off is red, or within `{x` and
/// `x}`.
fn preview(stretches: &[Stretch], colour: bool) -> String {
    let marks = |code: &str, open: &str, close: &str| match colour {
        true => (format!("\x1b[{code}m"), "\x1b[0m".to_owned()),
        false => (open.to_owned(), close.to_owned()),
    };
    let mut out = String::new();
    for stretch in stretches {
        let ((open, close), text) = match stretch {
            Stretch::Context(text) => (marks("2", "", ""), text.clone()),
            Stretch::Learnt(text) => (marks("32", "{{", "}}"), text.clone()),
            Stretch::Cut(text) => (marks("31;9", "{x", "x}"), text.clone()),
            Stretch::Image(n) => (marks("36", "", ""), format!("<image: {n} tokens>")),
        };
        out += &(open + &harmless(&text) + &close);
    }
    out
}

/// Text with line breaks as they are and control characters spelt out, which would steer the terminal.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// The percentiles that are shown.
const PERCENTILES: [(&str, f64); 6] = [("5", 0.05), ("25", 0.25), ("50", 0.5), ("75", 0.75), ("95", 0.95), ("100", 1.0)];

fn report_text(report: &Report, max_tokens: usize) -> String {
    let mut out = String::new();
    let mut line = |name: &str, n: usize| out += &format!("{name:<24} {n:>10}\n");
    line("rows", report.n_rows);
    line("turns", report.n_turns);
    line("images", report.n_images);
    line(&format!("longer than {max_tokens} tokens"), report.n_truncated);
    for fault in Fault::ALL {
        line(fault.name(), report.faults.get(&fault).copied().unwrap_or(0));
    }
    out += &format!("\n{:<24}", "percentile");
    PERCENTILES.iter().for_each(|(name, _)| out += &format!(" {name:>7}"));
    for (name, values) in [("tokens", &report.tokens), ("tokens that are learnt", &report.supervised)] {
        out += &format!("\n{name:<24}");
        for (_, p) in PERCENTILES {
            out += &format!(" {:>7}", percentile(values, p).map_or("-".to_owned(), |n| n.to_string()));
        }
    }
    out + "\n"
}

fn report_json(report: &Report, masker: &Masker) -> Value {
    let percentiles = |values: &[usize]| {
        let pairs = PERCENTILES.iter().map(|(name, p)| (format!("p{name}"), json!(percentile(values, *p))));
        pairs.collect::<serde_json::Map<_, _>>()
    };
    let faults = Fault::ALL.iter().map(|f| (f.name().to_owned(), json!(report.faults.get(f).copied().unwrap_or(0))));
    let bad = report.bad_rows.iter().map(
        |bad| json!({"file": bad.file.to_string_lossy(), "row": bad.number, "fault": bad.fault.name(), "message": bad.message}),
    );
    json!({
        "template": masker.template.name(), "max_tokens": masker.max_tokens,
        "rows": report.n_rows, "turns": report.n_turns, "images": report.n_images, "truncated": report.n_truncated,
        "faults": faults.collect::<serde_json::Map<_, _>>(), "bad_rows": bad.collect::<Vec<_>>(),
        "tokens": percentiles(&report.tokens), "supervised_tokens": percentiles(&report.supervised),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn previews_show_masks_with_and_without_colour() {
        let stretches = [
            Stretch::Context("USER: ".into()),
            Stretch::Image(576),
            Stretch::Context("\nq\x1b[2J ASSISTANT:".into()),
            Stretch::Learnt(" a</s>".into()),
            Stretch::Cut("USER".into()),
        ];
        assert_eq!(preview(&stretches, false), "USER: <image: 576 tokens>\nq\\u{1b}[2J ASSISTANT:{{ a</s>}}{xUSERx}");
        let coloured = preview(&stretches, true);
        assert!(coloured.contains("\x1b[32m a</s>\x1b[0m") && !coloured.contains("{{"), "{coloured}");
        assert!(!coloured.contains("\x1b[2J"), "{coloured:?}");
    }
}
