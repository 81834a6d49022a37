use serde_json::json;

use super::*;

fn config(architecture: &str, more: &Json) -> Told {
    let mut config = json!({
        "architectures": [architecture], "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4,
        "rope_theta": 20000.0, "max_position_embeddings": 4096
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    of_config(&config.to_string())
}

fn alike(base: f64, dims: usize, pairing: cinch_cache::Pairing) -> Told {
    Ok(RotaryLayers::Alike(Rotary::new(base, dims, pairing)))
}

#[test]
fn every_architecture_is_described_as_mistral_rs_turns_it() {
    let given = json!({"head_dim": 48, "partial_rotary_factor": 0.5});
    for (architecture, right) in [
        ("LlamaForCausalLM", alike(20_000.0, 32, Halves)),
        ("MistralForCausalLM", alike(20_000.0, 48, Halves)),
        ("MixtralForCausalLM", alike(20_000.0, 32, Halves)),
        ("Qwen2ForCausalLM", alike(20_000.0, 32, Halves)),
        ("Qwen3ForCausalLM", alike(20_000.0, 48, Halves)),
        ("Qwen3MoeForCausalLM", alike(20_000.0, 48, Halves)),
        ("Starcoder2ForCausalLM", alike(20_000.0, 32, Halves)),
        ("GemmaForCausalLM", alike(20_000.0, 48, Halves)),
        ("Gemma2ForCausalLM", alike(20_000.0, 48, Halves)),
        ("PhiForCausalLM", alike(20_000.0, 16, Halves)),
        ("Phi3ForCausalLM", alike(20_000.0, 16, Halves)),
        ("PhiMoEForCausalLM", alike(20_000.0, 32, Halves)),
        ("Glm4ForCausalLM", alike(20_000.0, 24, Neighbours)),
        ("Glm4MoeForCausalLM", alike(20_000.0, 24, Neighbours)),
    ] {
        assert_eq!(config(architecture, &given), right, "{architecture}");
    }
    // Each that is managed is known.
    for architecture in architecture::ARCHITECTURES {
        assert!(config(architecture, &given).is_ok(), "{architecture}");
    }
    let nested = json!({"rope_parameters": {"rope_theta": 5000.0}, "rope_theta": null});
    assert_eq!(config("MistralForCausalLM", &nested), alike(5000.0, 32, Halves));
    // Some layers' keys do not turn.
    let own = Rotary::new(20_000.0, 32, Halves);
    let mixed = |layers: [bool; 4]| {
        let of = |turns| if turns { own.clone() } else { Rotary::none() };
        Ok(RotaryLayers::Each(layers.map(of).to_vec()))
    };
    assert_eq!(
        config("SmolLM3ForCausalLM", &json!({"no_rope_layer_interval": 4})),
        mixed([true, true, true, false])
    );
    assert_eq!(
        config(
            "SmolLM3ForCausalLM",
            &json!({"no_rope_layer_interval": 4, "no_rope_layers": [1, 0, 1, 1]})
        ),
        mixed([true, false, true, true])
    );
}

#[test]
fn gemma_3_has_two_bases() {
    let given = |window: usize| {
        json!({
            "head_dim": 64, "sliding_window": window, "sliding_window_pattern": 2, "rope_theta": null,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}
        })
    };
    let mut global = Rotary::new(1_000_000.0, 64, Halves);
    scale(&mut global, 8.0);
    let local = Rotary::new(10_000.0, 64, Halves);
    let alike = RotaryLayers::Alike(global.clone());
    assert_eq!(config("Gemma3ForCausalLM", &given(512)), Ok(alike));
    // No window is ever full: all layers are managed.
    let layers = vec![local.clone(), global.clone(), local, global];
    assert_eq!(
        config("Gemma3ForCausalLM", &given(4096)),
        Ok(RotaryLayers::Each(layers))
    );
}

/// By the wavelength of each frequency, as the published models say.
#[test]
fn scalings_are_other_frequencies() {
    let scaled = |scaling: Json| {
        let given = json!({"rope_theta": 500_000.0, "rope_scaling": scaling, "num_attention_heads": 1});
        match config("LlamaForCausalLM", &given) {
            Ok(RotaryLayers::Alike(rotary)) => rotary.frequencies,
            other => panic!("{other:?}"),
        }
    };
    let plain = Rotary::new(500_000.0, 128, Halves).frequencies;
    let own = scaled(json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    }));
    let (mut kept, mut between, mut slowed) = (0, 0, 0);
    for (own, plain) in own.iter().zip(&plain) {
        let wavelength = 2.0 * std::f64::consts::PI / f64::from(*plain);
        let right = if wavelength < 8192.0 / 4.0 {
            kept += 1;
            f64::from(*plain)
        } else if wavelength > 8192.0 {
            slowed += 1;
            f64::from(*plain) / 8.0
        } else {
            between += 1;
            let smooth = (8192.0 / wavelength - 1.0) / 3.0;
            (1.0 - smooth) * f64::from(*plain) / 8.0 + smooth * f64::from(*plain)
        };
        assert!((f64::from(*own) / right - 1.0).abs() < 1e-5);
    }
    assert!(kept > 20 && between > 3 && slowed > 20);
    let linear = scaled(json!({"rope_type": "linear", "factor": 4.0}));
    assert!(
        linear
            .iter()
            .zip(&plain)
            .all(|(own, plain)| (own * 4.0 / plain - 1.0).abs() < 1e-6)
    );
    assert_eq!(scaled(json!({"rope_type": "default", "factor": 4.0})), plain);
}

#[test]
fn what_is_not_known_is_said_with_the_reason() {
    for (architecture, more, reason) in [
        (
            "Phi3ForCausalLM",
            json!({"rope_scaling": {"type": "longrope"}}),
            "longrope turns keys by other frequencies",
        ),
        (
            "LlamaForCausalLM",
            json!({"rope_scaling": {"rope_type": "dynamic"}}),
            "of type dynamic",
        ),
        (
            "LlamaForCausalLM",
            json!({"rope_scaling": {"rope_type": "linear"}}),
            "rope_scaling.factor is missing",
        ),
        (
            "Gemma3ForCausalLM",
            json!({"rope_scaling": {"rope_type": "yarn"}}),
            "of type yarn",
        ),
        (
            "LlamaForCausalLM",
            json!({"rope_theta": null}),
            "rope_theta is missing",
        ),
        (
            "SomethingForCausalLM",
            json!({}),
            "keys of SomethingForCausalLM is not known",
        ),
    ] {
        let told = config(architecture, &more).unwrap_err();
        assert!(told.contains(reason), "{told}");
    }
    assert!(of_config("{").unwrap_err().contains("config.json"));
}

#[test]
fn gguf_files_are_read_as_mistral_rs_reads_them() {
    let of = |name: &str, rope: &[(&str, Value)]| {
        let mut metadata =
            HashMap::from([("general.architecture".to_owned(), Value::String(name.to_owned()))]);
        let own = [
            ("embedding_length", Value::U32(256)),
            ("attention.head_count", Value::U32(4)),
            ("attention.key_length", Value::U32(96)),
            ("rope.dimension_count", Value::U32(32)),
        ];
        for (key, value) in own.iter().chain(rope) {
            metadata.insert(format!("{name}.{key}"), value.clone());
        }
        of_gguf(&metadata)
    };
    let base = [("rope.freq_base", Value::F32(500_000.0))];
    for (name, plain, given) in [
        (
            "llama",
            alike(10_000.0, 32, Neighbours),
            alike(500_000.0, 32, Neighbours),
        ),
        (
            "mistral3",
            alike(10_000.0, 32, Neighbours),
            alike(500_000.0, 32, Neighbours),
        ),
        ("phi2", alike(10_000.0, 32, Halves), alike(10_000.0, 32, Halves)),
        ("phi3", alike(10_000.0, 32, Halves), alike(10_000.0, 32, Halves)),
        ("qwen2", alike(10_000.0, 96, Halves), alike(500_000.0, 96, Halves)),
        ("qwen3", alike(10_000.0, 96, Halves), alike(500_000.0, 96, Halves)),
        (
            "qwen3moe",
            alike(10_000.0, 96, Halves),
            alike(500_000.0, 96, Halves),
        ),
        (
            "starcoder2",
            alike(100_000.0, 64, Halves),
            alike(500_000.0, 64, Halves),
        ),
    ] {
        assert_eq!(of(name, &[]), plain, "{name}");
        assert_eq!(of(name, &base), given, "{name}");
    }
    for name in crate::gguf_check::ARCHITECTURES {
        assert!(of(name, &[]).is_ok(), "{name}");
    }
    assert!(
        of("other", &[])
            .unwrap_err()
            .contains("keys of other is not known")
    );
    assert!(of_gguf(&HashMap::new()).is_err());
}
