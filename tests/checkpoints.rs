//! Opens every layout that `tools/reference` writes, and folders that are something else.

use std::fs;
use std::path::{Path, PathBuf};

use llava_engine::dtype::DType;
use llava_engine::error::Error;
use llava_engine::model::checkpoint::Checkpoint;
use llava_engine::model::config::{Activation, FeatureSelect, Fit, Profile, ProjectorConfig, RopeScaling};
use llava_engine::weights::Source;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/checkpoints", name].iter().collect()
}

/// Names and shapes of all tensors that a run of this checkpoint needs.
fn needed(checkpoint: &Checkpoint) -> Vec<(String, Vec<usize>)> {
    let config = &checkpoint.config;
    let (v, t) = (&config.vision, &config.text);
    let mut needed = vec![
        ("clip.class_embedding".to_owned(), vec![v.hidden_size]),
        ("clip.patch_embedding.weight".to_owned(), vec![v.hidden_size, 3, v.patch_size, v.patch_size]),
        ("clip.position_embedding.weight".to_owned(), vec![v.n_patches() + 1, v.hidden_size]),
        ("clip.pre_layernorm.weight".to_owned(), vec![v.hidden_size]),
        ("clip.pre_layernorm.bias".to_owned(), vec![v.hidden_size]),
        ("llama.embed_tokens.weight".to_owned(), vec![t.vocab_size, t.hidden_size]),
        ("llama.norm.weight".to_owned(), vec![t.hidden_size]),
    ];
    for i in 0..config.n_vision_layers {
        let (hidden, mlp) = (v.hidden_size, v.intermediate_size);
        for (module, out, input) in [
            ("self_attn.q_proj", hidden, Some(hidden)),
            ("self_attn.k_proj", hidden, Some(hidden)),
            ("self_attn.v_proj", hidden, Some(hidden)),
            ("self_attn.out_proj", hidden, Some(hidden)),
            ("mlp.fc1", mlp, Some(hidden)),
            ("mlp.fc2", hidden, Some(mlp)),
            ("layer_norm1", hidden, None),
            ("layer_norm2", hidden, None),
        ] {
            needed.push((format!("clip.layers.{i}.{module}.weight"), std::iter::once(out).chain(input).collect()));
            needed.push((format!("clip.layers.{i}.{module}.bias"), vec![out]));
        }
    }
    if let ProjectorConfig::Mlp { n_linear, .. } = config.projector {
        for k in 1..=n_linear {
            let input = if k == 1 { v.hidden_size } else { t.hidden_size };
            needed.push((format!("projector.linear_{k}.weight"), vec![t.hidden_size, input]));
            needed.push((format!("projector.linear_{k}.bias"), vec![t.hidden_size]));
        }
    }
    for i in 0..t.n_layers {
        let (hidden, mlp, q, kv) = (t.hidden_size, t.intermediate_size, t.n_heads * t.head_dim, t.n_kv_heads * t.head_dim);
        for (module, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("mlp.gate_proj", vec![mlp, hidden]),
            ("mlp.up_proj", vec![mlp, hidden]),
            ("mlp.down_proj", vec![hidden, mlp]),
        ] {
            needed.push((format!("llama.layers.{i}.{module}.weight"), shape));
        }
    }
    if !t.tie_word_embeddings {
        needed.push(("llama.lm_head.weight".to_owned(), vec![t.vocab_size, t.hidden_size]));
    }
    needed
}

/// Every checkpoint fixture, with what its layout is called; `{}` stands for the folder of the fixtures.
const LAYOUTS: [(&str, &str); 9] = [
    ("hf_mha_f32", "llava-hf, 1 safetensors file"),
    ("hf_gqa_bf16", "llava-hf, 3 safetensors files"),
    ("hf_gqa_f16", "llava-hf, 1 safetensors file"),
    ("hf_linear_rope_f32", "llava-hf, 1 safetensors file"),
    ("orig_mha_f32", "original LLaVA, 2 pickle files, vision tower in {}/orig_mha_f32/../clip-tower"),
    ("orig_gqa_bf16", "original LLaVA, 1 pickle file, vision tower inside"),
    ("orig_f16_safetensors", "original LLaVA, 1 safetensors file, vision tower in {}/orig_f16_safetensors/../clip-tower"),
    ("orig_identity_f16", "original LLaVA, 1 safetensors file, vision tower in {}/orig_identity_f16/../clip-tower"),
    (
        "orig_projector_over_base",
        "projector of the original LLaVA over {}/orig_projector_over_base/../base-llama, \
         vision tower in {}/orig_projector_over_base/../clip-tower",
    ),
];

#[test]
fn every_layout_holds_every_tensor() {
    for (name, layout) in LAYOUTS {
        let checkpoint = Checkpoint::open(&fixture(name), None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            checkpoint.layout.to_string(),
            layout.replace("{}", fixture("").to_str().unwrap().trim_end_matches('/')),
            "{name}"
        );
        for (tensor, shape) in needed(&checkpoint) {
            let tensor = checkpoint.weights.tensor(&tensor, &shape).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(tensor.to_f32().iter().all(|x| x.is_finite()), "{name}");
        }
        assert!(["tokenizer.json", "tokenizer.model"].iter().any(|file| checkpoint.tokenizer_dir.join(file).is_file()), "{name}");
    }
}

/// orig_mha_f32 holds the very weights of hf_mha_f32, in pickles and under other names, less the rows of the tokens that HF added.
#[test]
fn pickles_hold_the_bytes_of_their_safetensors_twin() {
    let original = Checkpoint::open(&fixture("orig_mha_f32"), None).unwrap();
    let hf = Checkpoint::open(&fixture("hf_mha_f32"), None).unwrap();
    for (name, shape) in needed(&original) {
        let tensor = original.weights.tensor(&name, &shape).unwrap();
        let twin_shape = hf.weights.shape(&name).unwrap().to_vec();
        let twin = hf.weights.tensor(&name, &twin_shape).unwrap();
        assert_eq!(tensor.as_bytes(), &twin.as_bytes()[..tensor.bytes()], "{name}");
        assert!(tensor.bytes() == twin.bytes() || name.contains("embed_tokens") || name.contains("lm_head"), "{name}");
    }
}

#[test]
fn configurations_are_read() {
    let open = |name| Checkpoint::open(&fixture(name), None).unwrap();
    let c = open("hf_gqa_f16").config; // as transformers 5 writes it
    assert_eq!((c.vision.image_size, c.vision.n_layers, c.vision.n_heads, c.n_vision_layers), (28, 4, 4, 4));
    assert_eq!((c.feature_select, c.tokens_per_image(), c.profile), (FeatureSelect::ClsPatch, 5, Profile::Hf));
    assert_eq!((c.text.n_kv_heads, c.text.head_dim, c.text.rms_norm_eps, c.text.tie_word_embeddings), (2, 8, 1e-4, true));
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 128 };
    assert_eq!((c.text.rope_theta, c.text.rope_scaling), (1e4, llama3));
    assert_eq!((c.image_token_index, c.eos_token_ids, c.context_tokens), (Some(320), vec![2], 512));
    assert_eq!((c.preprocess.shortest_edge, c.preprocess.crop_size, c.preprocess.fit), (28, 28, Fit::Crop));
    let c = open("hf_linear_rope_f32").config; // as transformers 4 does
    assert_eq!((c.text.head_dim, c.text.rope_scaling, c.n_vision_layers), (16, RopeScaling::Linear { factor: 4.0 }, 3));
    assert_eq!(c.vision.activation, Activation::QuickGelu);
    let c = open("hf_gqa_bf16").config;
    assert_eq!(
        (c.text.rope_theta, c.vision.layer_norm_eps, c.n_vision_layers, c.text.max_position_embeddings),
        (5e5, 1e-3, 4, 512)
    );
    let c = open("orig_mha_f32");
    assert_eq!((c.config.profile, c.config.preprocess.fit, c.dtype), (Profile::Original, Fit::Pad, DType::F32));
    let c = open("orig_f16_safetensors");
    assert_eq!(c.config.projector, ProjectorConfig::Mlp { n_linear: 1, activation: Activation::Gelu });
    assert_eq!((c.config.feature_select, c.config.n_vision_layers, c.dtype), (FeatureSelect::ClsPatch, 4, DType::F16));
    assert_eq!((c.config.preprocess.fit, c.config.image_token_index), (Fit::Crop, None));
    assert_eq!(open("orig_identity_f16").config.projector, ProjectorConfig::Identity);
    assert_eq!(open("orig_gqa_bf16").dtype, DType::Bf16);
    let mlp3 = ProjectorConfig::Mlp { n_linear: 3, activation: Activation::Gelu };
    assert_eq!(open("orig_projector_over_base").config.projector, mlp3);
}

/// A copy of a fixture, to be spoilt.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_into(&fixture(name), dir.path());
    dir
}

fn copy_into(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&target).unwrap();
            copy_into(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Sets the value at `pointer` (`/text_config/hidden_size`) of a JSON file; removes it if that is `None`.
fn edit(file: &Path, pointer: &str, value: Option<Value>) {
    let mut json: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = json.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    match value {
        Some(value) => _ = parent.insert(key.to_owned(), value),
        None => _ = parent.remove(key),
    }
    fs::write(file, json.to_string()).unwrap();
}

/// The error of opening `dir`, which must be typed and one line.
fn refusal(dir: &Path) -> String {
    let error = Checkpoint::open(dir, None).map(|c| c.layout.to_string()).unwrap_err();
    assert!(!matches!(error, Error::Usage(_) | Error::Shape { .. }), "{error:?}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn hostile_and_unsupported_configurations_are_refused_by_key() {
    let hf: &[(&str, Value)] = &[
        ("/text_config/hidden_size", json!(0)),
        ("/text_config/hidden_size", json!(-32)),
        ("/text_config/hidden_size", json!(32.5)),
        ("/text_config/hidden_size", json!("32")),
        ("/text_config/hidden_size", json!(u64::MAX)),
        ("/text_config/hidden_size", json!(1e300)),
        ("/text_config/intermediate_size", json!(1i64 << 40)),
        ("/text_config/vocab_size", json!(0)),
        ("/text_config/num_hidden_layers", json!(1_000_000)),
        ("/text_config/num_attention_heads", json!(5)),
        ("/text_config/num_key_value_heads", json!(3)),
        ("/text_config/head_dim", json!(12)),
        ("/text_config/rms_norm_eps", json!(-1e-5)),
        ("/text_config/rms_norm_eps", json!(1e300)),
        ("/text_config/max_position_embeddings", json!(0)),
        ("/text_config/attention_bias", json!(true)),
        ("/text_config/mlp_bias", json!(true)),
        ("/text_config/hidden_act", json!("gelu")),
        ("/text_config/model_type", json!("qwen2")),
        ("/text_config/partial_rotary_factor", json!(0.5)),
        ("/text_config/rope_scaling", json!({"type": "yarn", "factor": 2.0})),
        ("/text_config/rope_scaling", json!({"type": "linear"})),
        ("/text_config/rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})),
        ("/text_config/rope_scaling", json!({"type": "linear", "factor": 0})),
        ("/text_config", json!(7)),
        ("/vision_config/image_size", json!(57)),
        ("/vision_config/patch_size", json!(0)),
        ("/vision_config/num_attention_heads", json!(5)),
        ("/vision_config/num_channels", json!(1)),
        ("/vision_config/hidden_act", json!("gelu_new")),
        ("/vision_config/model_type", json!("siglip_vision_model")),
        ("/vision_feature_layer", json!(-6)),
        ("/vision_feature_layer", json!(5)),
        ("/vision_feature_layer", json!([-2, -5])),
        ("/vision_feature_select_strategy", json!("cls")),
        ("/projector_hidden_act", json!("relu")),
        ("/multimodal_projector_bias", json!(false)),
        ("/image_token_index", json!(-1)),
        ("/image_token_index", json!(100_000)),
        ("/quantization_config", json!({"quant_method": "awq"})),
    ];
    let original: &[(&str, Value)] = &[
        ("/mm_hidden_size", json!(64)),
        ("/mm_projector_type", json!("resampler")),
        ("/mm_projector_type", json!("mlp0x_gelu")),
        ("/mm_projector_type", json!("mlp99999999999999999999x_gelu")),
        ("/mm_vision_select_layer", json!(-9)),
        ("/mm_vision_select_layer", Value::Null),
        ("/mm_vision_select_feature", json!("cls")),
        ("/mm_vision_tower", Value::Null),
        ("/mm_vision_tower", json!("../no-such-tower")),
        ("/mm_use_im_start_end", json!(true)),
        ("/image_aspect_ratio", json!("anyres")),
        ("/mm_resampler_type", json!("qformer")),
        ("/s2", json!(true)),
        ("/model_type", json!("llava_mpt")),
        ("/eos_token_id", json!([])),
        ("/eos_token_id", json!(-1)),
        ("/max_sequence_length", json!(0)),
    ];
    for (name, edits) in [("hf_mha_f32", hf), ("orig_gqa_bf16", original)] {
        for (pointer, value) in edits {
            let dir = copy(name);
            edit(&dir.path().join("config.json"), pointer, Some(value.clone()));
            let error = refusal(dir.path());
            let key = pointer.rsplit('/').next().unwrap();
            assert!(error.contains(key) && error.contains("config.json"), "{pointer} = {value}: {error}");
        }
    }
}

#[test]
fn absent_keys_have_the_defaults_of_hf() {
    let dir = copy("hf_mha_f32");
    let config = dir.path().join("config.json");
    for key in ["vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act", "pad_token_id"] {
        edit(&config, &format!("/{key}"), None);
    }
    for key in ["rms_norm_eps", "num_key_value_heads", "max_position_embeddings"] {
        edit(&config, &format!("/text_config/{key}"), None);
    }
    let c = Checkpoint::open(dir.path(), None).unwrap().config;
    assert_eq!((c.n_vision_layers, c.feature_select, c.vision.layer_norm_eps), (3, FeatureSelect::Patch, 1e-5));
    assert_eq!(c.projector, ProjectorConfig::Mlp { n_linear: 2, activation: Activation::Gelu });
    assert_eq!((c.text.rms_norm_eps, c.text.n_kv_heads, c.context_tokens, c.text.rope_theta), (1e-6, 4, 2048, 1e4));
    // With no vision_config at all the tower is ViT-L/14-336, whose pictures this preprocessing does not make.
    edit(&config, "/vision_config", None);
    assert!(refusal(dir.path()).contains("the picture size of the vision tower, 336"));
}

#[test]
fn other_places_of_the_same_facts() {
    let dir = copy("hf_mha_f32");
    let config = dir.path().join("config.json");
    edit(&config, "/image_token_index", None);
    edit(&config, "/image_token_id", Some(json!(320)));
    edit(&config, "/text_config/model_type", Some(json!("mistral")));
    edit(&config, "/text_config/num_key_value_heads", Some(json!(4)));
    edit(&config, "/text_config/max_position_embeddings", Some(json!(8192)));
    assert!(refusal(dir.path()).contains("sliding_window")); // 4096 unless it says null
    edit(&config, "/text_config/sliding_window", Some(Value::Null));
    edit(&config, "/text_config/tie_word_embeddings", Some(json!(true)));
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 7]}"#).unwrap();
    let preprocessor = fs::read(dir.path().join("preprocessor_config.json")).unwrap();
    fs::remove_file(dir.path().join("preprocessor_config.json")).unwrap();
    assert!(refusal(dir.path()).contains("neither preprocessor_config.json nor"));
    let nested = json!({"image_processor": serde_json::from_slice::<Value>(&preprocessor).unwrap()});
    fs::write(dir.path().join("processor_config.json"), nested.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    assert_eq!((checkpoint.config.image_token_index, checkpoint.config.text.tie_word_embeddings), (Some(320), true));
    assert_eq!(checkpoint.config.eos_token_ids, [2, 7]);
    assert_eq!((checkpoint.config.preprocess.crop_size, checkpoint.chat_template), (56, None));

    // Each place of the chat template beats those before it in this list.
    let templates = [
        (
            "tokenizer_config.json",
            json!({"chat_template": [{"name": "rag", "template": "0"}, {"name": "default", "template": "1"}]}).to_string(),
            "1",
        ),
        ("tokenizer_config.json", json!({"chat_template": "2"}).to_string(), "2"),
        ("chat_template.json", json!({"chat_template": "3"}).to_string(), "3"),
        ("chat_template.jinja", "4".to_owned(), "4"),
    ];
    for (file, content, template) in templates {
        fs::write(dir.path().join(file), content).unwrap();
        assert_eq!(Checkpoint::open(dir.path(), None).unwrap().chat_template.as_deref(), Some(template));
    }
}

#[test]
fn preprocessing_that_would_differ_is_refused() {
    for (pointer, value) in [
        ("/resample", json!(2)),
        ("/rescale_factor", json!(1.0)),
        ("/do_normalize", json!(false)),
        ("/do_center_crop", json!(false)),
        ("/size", json!({"height": 56, "width": 56})),
        ("/size", json!({"shortest_edge": 28})),
        ("/size", json!({"shortest_edge": 0})),
        ("/crop_size", json!({"height": 56, "width": 28})),
        ("/crop_size", json!(224)),
        ("/image_std", json!([1.0, 0.0, 1.0])),
        ("/image_mean", json!([1.0, 0.0])),
    ] {
        let dir = copy("hf_mha_f32");
        edit(&dir.path().join("preprocessor_config.json"), pointer, Some(value.clone()));
        let error = refusal(dir.path());
        assert!(error.contains("preprocessor_config.json") && error.contains(&pointer[1..]), "{pointer} = {value}: {error}");
    }
}

#[test]
fn folders_that_hold_something_else_are_named() {
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("an empty folder"));
    assert!(refusal(&empty.path().join("none")).contains("No such file"));
    assert!(refusal(&fixture("clip-tower")).contains("a CLIP model"));
    assert!(refusal(&fixture("base-llama")).contains("a LLaMA without a projector"));
    assert!(refusal(&fixture("hf_mha_f32").join("model.safetensors")).contains("name the folder"));
    for (file, content, what) in [
        ("ggml-model.gguf", "GGUF", "ends inside its header"),
        ("ggml-model.gguf", "GGML", "not a GGUF file"),
        ("adapter_config.json", "{}", "a LoRA adapter"),
        ("model.safetensors", "", "weights without config.json"),
        ("mm_projector.bin", "", "a projector without the config.json"),
        ("README.md", "", "not a checkpoint"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "{}", "does not say that it is a LLaVA"),
        ("config.json", r#"{"model_type": "llava_next"}"#, "a LLaVA-1.6 (llava_next)"),
        ("config.json", r#"{"model_type": "bert"}"#, "a model of type `bert`"),
        ("config.json", r#"{"model_type": "llava"}"#, "without its weights"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(file), content).unwrap();
        let error = refusal(dir.path());
        assert!(error.contains(what), "{file}: {error}");
    }
}

#[test]
fn incomplete_checkpoints_say_what_is_missing() {
    let dir = copy("hf_gqa_bf16");
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(refusal(dir.path()).contains("model-00002-of-00003.safetensors"));
    fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    assert!(refusal(dir.path()).contains("shard 2 of 3"));

    let dir = copy("hf_mha_f32");
    edit(&dir.path().join("config.json"), "/text_config/num_hidden_layers", Some(json!(3)));
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    let error = checkpoint.weights.tensor("llama.layers.2.mlp.up_proj.weight", &[48, 32]).unwrap_err().to_string();
    assert!(error.contains("`llama.layers.2.mlp.up_proj.weight`: missing"), "{error}");

    let dir = copy("orig_mha_f32");
    edit(&dir.path().join("config.json"), "/mm_vision_tower", Some(json!(fixture("clip-tower"))));
    Checkpoint::open(dir.path(), None).unwrap();
    fs::write(dir.path().join("pytorch_model.bin.index.json"), r#"{"weight_map": {"a": "../../secret.bin"}}"#).unwrap();
    assert!(refusal(dir.path()).contains("a shard is named by a plain file name"));

    let dir = copy("orig_projector_over_base");
    edit(&dir.path().join("config.json"), "/mm_vision_tower", Some(json!(fixture("clip-tower"))));
    assert!(refusal(dir.path()).contains("a projector without its decoder"));
    let checkpoint = Checkpoint::open(dir.path(), Some(fixture("base-llama").as_path())).unwrap();
    assert_eq!(checkpoint.tokenizer_dir, fixture("base-llama"));
    assert!(Checkpoint::open(dir.path(), Some(dir.path().join("none").as_path())).is_err());
}
