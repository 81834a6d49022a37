//! How large a request may become, before the engine has seen it.

use mistralrs_core::{NormalRequest, RequestMessage};
use serde_json::Value;

use crate::state::TokenCount;

/// What a chat template puts round a message, at most: role, separators, a line of its own.
const TEMPLATE_PER_MESSAGE: usize = 16;
/// What it puts round the conversation: a system prompt where none is given, the opening of the answer. A template
/// that adds more is counted right once the engine has applied it.
const TEMPLATE: usize = 96;

/// The texts of a prompt, and the tokens that come on top of them.
#[derive(Debug, PartialEq)]
pub(super) struct Prompt {
    texts: Vec<String>,
    more: usize,
}

impl Prompt {
    /// Of a request as mistral.rs takes it; `body` is what the client sent.
    pub(super) fn of(request: &NormalRequest, body: &Value) -> Self {
        match &request.messages {
            RequestMessage::Completion { text, .. } => Self {
                texts: vec![text.clone()],
                more: 0,
            },
            RequestMessage::CompletionTokens(tokens) => Self {
                texts: Vec::new(),
                more: tokens.len(),
            },
            _ => Self::of_chat(body),
        }
    }

    fn of_chat(body: &Value) -> Self {
        let mut texts = Vec::new();
        let messages = body.get("messages");
        let count = match messages {
            Some(Value::Array(messages)) => {
                for (key, value) in messages.iter().filter_map(Value::as_object).flatten() {
                    match (key.as_str(), value) {
                        ("role", _) => {}
                        (_, Value::String(text)) => texts.push(text.clone()),
                        ("content", Value::Array(parts)) => {
                            let text =
                                |part: &Value| part.get("text").and_then(Value::as_str).map(str::to_owned);
                            texts.extend(parts.iter().filter_map(text));
                        }
                        (_, other) => texts.push(other.to_string()),
                    }
                }
                messages.len()
            }
            Some(Value::String(text)) => {
                texts.push(text.clone());
                1
            }
            _ => 0,
        };
        // Templates print tools as JSON, most of them indented.
        if let Some(tools) = body.get("tools").filter(|tools| !tools.is_null()) {
            texts.push(serde_json::to_string_pretty(tools).unwrap_or_default());
        }
        Self {
            texts,
            more: TEMPLATE + count * TEMPLATE_PER_MESSAGE,
        }
    }

    /// Its tokens. Takes as long as the text is.
    pub(super) fn tokens(&self, count: &TokenCount) -> usize {
        // No token is shorter than a byte.
        let of = |text: &String| count(text).unwrap_or(text.len());
        self.more + self.texts.iter().map(of).sum::<usize>()
    }
}

/// Tokens a request may generate: what it asked for or else the configured number, within the model's context.
pub(super) fn new_tokens(asked: Option<usize>, default: usize, prompt: usize, context: usize) -> usize {
    asked
        .unwrap_or(default)
        .min(context.saturating_sub(prompt))
        .max(1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    #[test]
    fn every_text_of_a_chat_counts() {
        let body = json!({
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two three"}]},
                {"role": "assistant", "content": null, "name": "ann"},
            ],
            "tools": [{"type": "function"}],
        });
        let prompt = Prompt::of_chat(&body);
        let words: TokenCount = Arc::new(|text| Some(text.split_whitespace().count()));
        let texts = 2 + 1 + 2 + 1 + 1 + 6;
        assert_eq!(
            prompt.tokens(&words),
            texts + TEMPLATE + 3 * TEMPLATE_PER_MESSAGE,
            "{prompt:?}"
        );
        let none: TokenCount = Arc::new(|_| None);
        assert!(
            prompt.tokens(&none) > prompt.tokens(&words),
            "bytes, where nothing counts tokens"
        );
    }

    #[test]
    fn what_is_generated_stays_in_the_context() {
        assert_eq!(new_tokens(Some(50), 1024, 100, 2048), 50);
        assert_eq!(new_tokens(None, 1024, 100, 2048), 1024);
        assert_eq!(new_tokens(None, 1024, 1500, 2048), 548);
        assert_eq!(new_tokens(Some(9999), 1024, 100, 2048), 1948);
        assert_eq!(
            new_tokens(Some(5), 1024, 4000, 2048),
            1,
            "the engine refuses such a prompt itself"
        );
    }
}
