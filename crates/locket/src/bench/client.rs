//! One streamed request: its body, its events and its clock.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::sse::SseDecoder;

/// Which route the load goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Endpoint {
    /// `/v1/chat/completions`, the prompt as one user message.
    Chat,
    /// `/v1/completions`, the prompt as it is.
    Completions,
}

impl Endpoint {
    /// The route's path.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// The server under load and what every request to it has in common.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// Opens a connection per request.
    pub http: reqwest::Client,
    /// `http://host:port`, without `/v1` and without a slash at the end.
    pub base_url: String,
    /// Sent as `Authorization: Bearer`.
    pub api_key: Option<String>,
    /// Served model name.
    pub model: String,
    /// Route.
    pub endpoint: Endpoint,
    /// Fields added to every body.
    pub extra_body: Map<String, Value>,
    /// A request that takes longer has failed.
    pub timeout: Duration,
}

/// What one successful request took.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Completed {
    /// From sending the request to the first text.
    pub first_token: Duration,
    /// Between neighbouring chunks with text.
    pub chunk_gaps: Vec<Duration>,
    /// From sending the request to the end of the stream.
    pub end_to_end: Duration,
    /// From the first text to the last.
    pub decode: Duration,
    /// Chunks with text; a server may put several tokens in one, never one token in several.
    pub chunks: usize,
    /// The server's usage, if it sent one.
    pub usage: Option<Usage>,
}

/// Token counts as the server reports them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
pub(super) struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: usize,
    /// Generated tokens.
    #[serde(default)]
    pub completion_tokens: usize,
}

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// `connect`, `timeout`, `http_STATUS`, `error_event`, `cut_off`, `malformed` or `transport`.
    pub kind: String,
    /// The server's words, or the transport's.
    pub message: String,
}

impl Failure {
    fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }

    fn transport(error: &reqwest::Error) -> Self {
        let kind = if error.is_connect() {
            "connect"
        } else if error.is_timeout() {
            "timeout"
        } else {
            "transport"
        };
        // The cause ("connection refused") lies deepest; the levels above only say where it happened.
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Self::new(kind, cause.to_string())
    }
}

impl Target {
    /// A request with the key, if there is one.
    pub(super) fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base_url));
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// The body of a request for `max_tokens` tokens after `prompt`.
    fn body(&self, prompt: &str, max_tokens: usize, stream: bool) -> Value {
        let mut body = json!({"model": self.model, "max_tokens": max_tokens, "temperature": 0});
        match self.endpoint {
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
            Endpoint::Completions => body["prompt"] = json!(prompt),
        }
        if stream {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
        }
        for (field, value) in &self.extra_body {
            body[field] = value.clone();
        }
        body
    }

    async fn send(
        &self,
        prompt: &str,
        max_tokens: usize,
        stream: bool,
    ) -> Result<reqwest::Response, Failure> {
        let request = self
            .request(reqwest::Method::POST, self.endpoint.path())
            .json(&self.body(prompt, max_tokens, stream));
        let response = request.send().await.map_err(|error| Failure::transport(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let text = response.text().await.unwrap_or_default();
        let message = serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|body| error_message(&body))
            .unwrap_or_else(|| text.chars().take(200).collect());
        Err(Failure::new(format!("http_{}", status.as_u16()), message))
    }

    /// The usage that the server reports for `prompt`, from an unstreamed request for one token.
    pub(super) async fn probe_usage(&self, prompt: &str) -> Result<Usage, Failure> {
        let work = async {
            let response = self.send(prompt, 1, false).await?;
            let body: Value = response.json().await.map_err(|error| Failure::transport(&error))?;
            serde_json::from_value(body["usage"].clone())
                .map_err(|_| Failure::new("malformed", "the answer has no usage with prompt_tokens"))
        };
        self.within_timeout(work).await
    }

    /// Streams one request and measures it.
    pub(super) async fn stream(&self, prompt: &str, max_tokens: usize) -> Result<Completed, Failure> {
        let work = async {
            let mut account = StreamAccount::start(Instant::now());
            let mut response = self.send(prompt, max_tokens, true).await?;
            let mut decoder = SseDecoder::default();
            let mut events = Vec::new();
            while let Some(bytes) = response.chunk().await.map_err(|error| Failure::transport(&error))? {
                let now = Instant::now();
                decoder
                    .push(&bytes, &mut events)
                    .map_err(|_| Failure::new("malformed", "an event of the stream is too long"))?;
                for event in events.drain(..) {
                    account.event(&event, now)?;
                }
            }
            account.finish()
        };
        self.within_timeout(work).await
    }

    async fn within_timeout<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        tokio::time::timeout(self.timeout, work).await.unwrap_or_else(|_| {
            Err(Failure::new("timeout", format!("not finished after {:?}", self.timeout)))
        })
    }
}

/// Message of an error body in OpenAI's shape.
fn error_message(body: &Value) -> Option<String> {
    let error = body.get("error")?;
    Some(error.get("message").and_then(Value::as_str).map_or_else(|| error.to_string(), str::to_owned))
}

/// Books the events of one stream.
#[derive(Debug)]
struct StreamAccount {
    sent: Instant,
    /// Arrival of every chunk with text.
    texts: Vec<Instant>,
    /// When generation was declared over; stands in for the text if no token had any.
    finished: Option<Instant>,
    usage: Option<Usage>,
    done: Option<Instant>,
}

impl StreamAccount {
    fn start(sent: Instant) -> Self {
        Self { sent, texts: Vec::new(), finished: None, usage: None, done: None }
    }

    /// Books one event's data that arrived at `now`.
    fn event(&mut self, data: &str, now: Instant) -> Result<(), Failure> {
        if data == "[DONE]" {
            self.done = Some(now);
            return Ok(());
        }
        let chunk: Value = serde_json::from_str(data)
            .map_err(|error| Failure::new("malformed", format!("an event is not JSON: {error}")))?;
        if let Some(message) = error_message(&chunk) {
            return Err(Failure::new("error_event", message));
        }
        if let Ok(usage) = serde_json::from_value(chunk["usage"].clone()) {
            self.usage = Some(usage);
        }
        let choice = &chunk["choices"][0];
        let texts = [&choice["text"], &choice["delta"]["content"], &choice["delta"]["reasoning_content"]];
        if texts.iter().any(|text| text.as_str().is_some_and(|text| !text.is_empty())) {
            self.texts.push(now);
        }
        if choice["finish_reason"].is_string() {
            self.finished = Some(now);
        }
        Ok(())
    }

    fn finish(self) -> Result<Completed, Failure> {
        let (Some(done), Some(finished)) = (self.done, self.finished) else {
            let missing = if self.finished.is_none() { "finish_reason" } else { "[DONE]" };
            return Err(Failure::new("cut_off", format!("the stream ended without {missing}")));
        };
        let first = self.texts.first().copied().unwrap_or(finished);
        let last = self.texts.last().copied().unwrap_or(finished);
        Ok(Completed {
            first_token: first - self.sent,
            chunk_gaps: self.texts.windows(2).map(|pair| pair[1] - pair[0]).collect(),
            end_to_end: done - self.sent,
            decode: last - first,
            chunks: self.texts.len(),
            usage: self.usage,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Books `(milliseconds, data)` events of a made-up clock.
    fn book(events: &[(u64, &str)]) -> Result<Completed, Failure> {
        let start = Instant::now();
        let mut account = StreamAccount::start(start);
        for (at_ms, data) in events {
            account.event(data, start + Duration::from_millis(*at_ms))?;
        }
        account.finish()
    }

    #[test]
    fn role_and_usage_chunks_are_not_tokens() {
        let ms = Duration::from_millis;
        let completed = book(&[
            (5, r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}"#),
            (20, r#"{"choices":[{"delta":{"content":"a"}}],"usage":null}"#),
            (30, r#"{"choices":[{"delta":{"content":"b"}}]}"#),
            (50, r#"{"choices":[{"delta":{"content":"c"}}]}"#),
            (55, r#"{"choices":[{"delta":{},"finish_reason":"length"}]}"#),
            (56, r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4,"total_tokens":11}}"#),
            (57, "[DONE]"),
        ])
        .unwrap();
        assert_eq!(completed.first_token, ms(20));
        assert_eq!(completed.chunk_gaps, [ms(10), ms(20)]);
        assert_eq!((completed.decode, completed.end_to_end, completed.chunks), (ms(30), ms(57), 3));
        assert_eq!(completed.usage, Some(Usage { prompt_tokens: 7, completion_tokens: 4 }));
    }

    #[test]
    fn completions_text_in_the_last_chunk_counts() {
        let completed = book(&[
            (10, r#"{"choices":[{"text":"a","finish_reason":null}]}"#),
            (30, r#"{"choices":[{"text":"b","finish_reason":"length"}]}"#),
            (31, "[DONE]"),
        ])
        .unwrap();
        assert_eq!((completed.chunks, completed.usage), (2, None));
        assert_eq!(completed.decode, Duration::from_millis(20));
    }

    #[test]
    fn broken_streams_have_a_kind() {
        let kind = |events: &[(u64, &str)]| book(events).unwrap_err().kind;
        let text = (1, r#"{"choices":[{"text":"a"}]}"#);
        assert_eq!(kind(&[text]), "cut_off");
        assert_eq!(kind(&[text, (2, "[DONE]")]), "cut_off");
        assert_eq!(kind(&[(1, r#"{"choices":[{"text":"","finish_reason":"stop"}]}"#)]), "cut_off");
        assert_eq!(kind(&[(1, "{\"choices\"")]), "malformed");
        assert_eq!(kind(&[text, (2, r#"{"error":{"message":"engine died"}}"#)]), "error_event");
    }
}
