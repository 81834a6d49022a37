//! A byte-level BPE of all bytes, a few merges and the tokens of a chat.

use serde_json::{Map, Value, json};

/// The end-of-text token.
pub(super) const END: u32 = 261;

/// Most of an English text's pairs; `Ġ` is how a byte-level BPE writes a space.
pub(super) const MERGES: [(&str, &str); 5] = [("Ġ", "t"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n")];

/// The end of text, a chat's roles, and what mistral.rs adds for Gemma 3 where it is missing.
const SPECIAL: [&str; 6] = [
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
];

pub(super) const TEMPLATE: &str = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}\
                                   <|assistant|>";

/// How a byte-level BPE writes each byte: printable ones as they are, the others as the characters from 256 on.
fn byte_tokens() -> impl Iterator<Item = String> {
    let mut others = 256..;
    (0_u32..256).map(move |byte| {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if printable { byte } else { others.next().unwrap() };
        char::from_u32(code).unwrap().to_string()
    })
}

/// All tokens; a token's id is its place.
pub(super) fn vocabulary() -> Vec<String> {
    let merged = MERGES.iter().map(|(left, right)| format!("{left}{right}"));
    byte_tokens()
        .chain(merged)
        .chain(SPECIAL.map(str::to_owned))
        .collect()
}

/// Whether a token is one of text.
pub(super) fn is_text(id: usize) -> bool {
    id < END as usize
}

/// tokenizer.json.
pub(super) fn json() -> Value {
    let vocabulary = vocabulary();
    let (text, special) = vocabulary.split_at(END as usize);
    let ids: Map<String, Value> = text
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), id.into()))
        .collect();
    let added: Vec<Value> = special
        .iter()
        .zip(END..)
        .map(|(token, id)| {
            json!({
                "id": id, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false,
            })
        })
        .collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": bytes,
        "post_processor": null,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": ids,
            "merges": MERGES.map(|(left, right)| format!("{left} {right}")),
        },
    })
}

/// `tokenizer_config.json`.
pub(super) fn config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    })
}
