//! What one key may use: requests and tokens in a minute, requests at once.
//!
//! Tokens are charged in two steps. At admission the prompt and the longest answer are taken from the
//! budget, because what an answer will be is not known; when the request has ended, however it did,
//! what was not used is given back. A key can so never have more under way than its budget, and pays
//! for what it got.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    LimitSettings,
    bucket::{Bucket, Standing},
};
use crate::error::{ApiError, ErrorKind};

/// A limit of a key, as a label of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    Requests,
    Tokens,
    Concurrent,
}

impl Limit {
    pub(crate) const ALL: [Self; 3] = [Self::Requests, Self::Tokens, Self::Concurrent];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Concurrent => "concurrent",
        }
    }
}

/// The refusal of a request by a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exceeded {
    pub(crate) limit: Limit,
    allowed: u32,
    wait: Duration,
}

impl Exceeded {
    pub(crate) fn into_error(self) -> ApiError {
        let allowed = self.allowed;
        let message = match self.limit {
            Limit::Requests => format!("This API key may send {allowed} requests per minute."),
            Limit::Tokens => format!(
                "This API key may use {allowed} tokens per minute; a request counts with its prompt and its \
                 longest answer until it ends."
            ),
            Limit::Concurrent => format!("This API key may have {allowed} requests running at once."),
        };
        let message = format!("{message} Try again later.");
        ApiError { wait: Some(self.wait), ..ApiError::new(ErrorKind::RateLimitExceeded, message) }
    }
}

/// What is left of a key's budgets.
#[derive(Debug)]
pub(crate) struct KeyLimits {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrent: Option<(u32, Arc<Semaphore>)>,
}

/// The right of a key to have one more request running; given back when dropped.
pub(crate) type KeySlot = Option<OwnedSemaphorePermit>;

impl KeyLimits {
    /// Full budgets.
    pub(crate) fn new(settings: LimitSettings) -> Self {
        let now = Instant::now();
        let bucket = |per_minute: Option<u32>| per_minute.map(|limit| Bucket::new(limit, now));
        Self {
            requests: bucket(settings.requests_per_minute),
            tokens: bucket(settings.tokens_per_minute),
            concurrent: settings
                .max_concurrent
                .map(|limit| (limit, Arc::new(Semaphore::new(limit as usize)))),
        }
    }

    /// Counts one request in.
    pub(crate) fn admit(&self) -> Result<KeySlot, Exceeded> {
        /// Nobody knows when a running request ends.
        const NEXT_TRY: Duration = Duration::from_secs(1);
        let slot = match &self.concurrent {
            None => None,
            Some((allowed, semaphore)) => {
                let slot = Arc::clone(semaphore).try_acquire_owned();
                let refused = Exceeded { limit: Limit::Concurrent, allowed: *allowed, wait: NEXT_TRY };
                Some(slot.map_err(|_| refused)?)
            }
        };
        if let Some(bucket) = &self.requests {
            charge(bucket, Limit::Requests, 1)?;
        }
        Ok(slot)
    }

    /// Puts the state of the budgets on an answer.
    pub(crate) fn write_headers(&self, headers: &mut HeaderMap) {
        const REQUESTS: [&str; 3] =
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
        const TOKENS: [&str; 3] =
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
        for (bucket, names) in [(&self.requests, REQUESTS), (&self.tokens, TOKENS)] {
            let Some(Standing { limit, remaining, reset }) =
                bucket.as_ref().map(|bucket| bucket.standing(Instant::now()))
            else {
                continue;
            };
            let [limit_name, remaining_name, reset_name] = names.map(HeaderName::from_static);
            headers.insert(limit_name, HeaderValue::from(limit));
            headers.insert(remaining_name, HeaderValue::from(remaining));
            if let Ok(reset) = HeaderValue::from_str(&in_words(reset)) {
                headers.insert(reset_name, reset);
            }
        }
    }
}

fn charge(bucket: &Bucket, limit: Limit, amount: u64) -> Result<(), Exceeded> {
    let now = Instant::now();
    bucket.take(amount, now).map_err(|wait| Exceeded { limit, allowed: bucket.standing(now).limit, wait })
}

/// `0s`, `7s`, `6m0s`: whole seconds, rounded up.
fn in_words(duration: Duration) -> String {
    let seconds = duration.as_millis().div_ceil(1000);
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}

/// Tokens of a key's budget that a request holds. What was not used goes back when it is dropped.
#[derive(Debug)]
pub(crate) struct TokenReservation {
    limits: Arc<KeyLimits>,
    reserved: u64,
    used: u64,
}

impl TokenReservation {
    /// Takes tokens for prompts and longest answers.
    pub(crate) fn take(limits: &Arc<KeyLimits>, tokens: u64) -> Result<Self, Exceeded> {
        if let Some(bucket) = &limits.tokens {
            charge(bucket, Limit::Tokens, tokens)?;
        }
        Ok(Self { limits: Arc::clone(limits), reserved: tokens, used: 0 })
    }

    /// Says what the request has used so far.
    pub(crate) fn use_up(&mut self, tokens: u64) {
        self.used = tokens;
    }
}

impl Drop for TokenReservation {
    fn drop(&mut self) {
        if let Some(bucket) = &self.limits.tokens {
            bucket.give_back(self.reserved.saturating_sub(self.used), Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests: Option<u32>, tokens: Option<u32>, concurrent: Option<u32>) -> Arc<KeyLimits> {
        Arc::new(KeyLimits::new(LimitSettings {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            max_concurrent: concurrent,
        }))
    }

    #[test]
    fn requests_at_once() {
        let limits = limits(None, None, Some(2));
        let (first, _second) = (limits.admit().expect("one"), limits.admit().expect("two"));
        let refused = limits.admit().expect_err("no third");
        assert_eq!((refused.limit, refused.wait), (Limit::Concurrent, Duration::from_secs(1)));
        drop(first);
        assert!(limits.admit().is_ok());
    }

    #[test]
    fn requests_in_a_minute() {
        let limits = limits(Some(2), None, None);
        assert!(limits.admit().is_ok() && limits.admit().is_ok());
        let refused = limits.admit().expect_err("no third");
        assert_eq!(refused.limit, Limit::Requests);
        assert!(refused.wait <= Duration::from_secs(30), "{refused:?}");
        let error = refused.into_error();
        assert!(error.message.contains("2 requests per minute"), "{}", error.message);
        assert!(error.wait.is_some());
    }

    /// Unused tokens come back, used ones do not.
    #[test]
    fn tokens_are_settled() {
        let limits = limits(None, Some(100_000), None);
        let remaining = || limits.tokens.as_ref().map(|bucket| bucket.standing(Instant::now()).remaining);
        let mut first = TokenReservation::take(&limits, 80_000).expect("enough");
        assert_eq!(TokenReservation::take(&limits, 80_000).expect_err("too many").limit, Limit::Tokens);
        first.use_up(30_000);
        drop(first);
        let after = remaining().expect("a limit");
        assert!((70_000..75_000).contains(&after), "{after}");
        drop(TokenReservation::take(&limits, 60_000).expect("enough"));
        assert!(remaining().expect("a limit") >= after);
    }

    #[test]
    fn headers_only_for_what_is_limited() {
        let mut headers = HeaderMap::new();
        limits(None, None, Some(3)).write_headers(&mut headers);
        assert!(headers.is_empty());
        limits(Some(60), None, None).write_headers(&mut headers);
        assert_eq!(headers["x-ratelimit-limit-requests"], "60");
        assert_eq!(headers["x-ratelimit-remaining-requests"], "60");
        assert_eq!(headers["x-ratelimit-reset-requests"], "0s");
        assert_eq!(headers.len(), 3);
    }

    #[test]
    fn durations_in_words() {
        for (millis, words) in [(0, "0s"), (1, "1s"), (59_001, "1m0s"), (360_000, "6m0s"), (61_500, "1m2s")] {
            assert_eq!(in_words(Duration::from_millis(millis)), words);
        }
    }
}
