//! A budget that fills up evenly: what may be used in a minute, what is left, and when more comes.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A token bucket that holds one minute's worth. What was taken in advance can be given back, and
/// one charge may be larger than the bucket: it then needs a full one and leaves a debt.
#[derive(Debug)]
pub(super) struct Bucket {
    per_minute: u32,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// Below zero is a debt.
    level: f64,
    at: Instant,
}

/// What a client is told about a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// In a minute.
    pub(super) limit: u32,
    /// At once.
    pub(super) remaining: u32,
    /// Until the budget is whole again.
    pub(super) reset: Duration,
}

impl Bucket {
    /// A full bucket.
    pub(super) fn new(per_minute: u32, now: Instant) -> Self {
        Self { per_minute, state: Mutex::new(State { level: f64::from(per_minute), at: now }) }
    }

    fn with_state<T>(&self, now: Instant, work: impl FnOnce(&mut State, f64) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let full = f64::from(self.per_minute);
        let seconds = now.saturating_duration_since(state.at).as_secs_f64();
        state.level = (state.level + seconds * full / 60.0).min(full);
        state.at = state.at.max(now);
        work(&mut state, full)
    }

    /// Takes `amount`, or says how long to wait for it.
    pub(super) fn take(&self, amount: u64, now: Instant) -> Result<(), Duration> {
        self.with_state(now, |state, full| {
            // Rounding must not refuse what has just been waited for.
            const ROUNDING: f64 = 1e-6;
            let needed = (amount as f64).min(full);
            if state.level + ROUNDING < needed {
                return Err(Duration::from_secs_f64((needed - state.level) * 60.0 / full));
            }
            state.level -= amount as f64;
            Ok(())
        })
    }

    /// Gives back what was taken and not used.
    pub(super) fn give_back(&self, amount: u64, now: Instant) {
        self.with_state(now, |state, full| state.level = (state.level + amount as f64).min(full));
    }

    pub(super) fn standing(&self, now: Instant) -> Standing {
        self.with_state(now, |state, full| Standing {
            limit: self.per_minute,
            // At most `per_minute`.
            remaining: (state.level + 1e-6).max(0.0) as u32,
            reset: Duration::from_secs_f64((full - state.level).max(0.0) * 60.0 / full),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn taken_refused_refilled_and_given_back() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let bucket = Bucket::new(60, start);
        assert_eq!(bucket.take(60, start), Ok(()));
        assert_eq!(bucket.take(1, start), Err(Duration::from_secs(1)));
        assert_eq!(bucket.take(1, at(1.0)), Ok(()));
        assert_eq!(bucket.take(30, at(11.0)), Err(Duration::from_secs(20)));
        bucket.give_back(20, at(11.0));
        assert_eq!(bucket.take(30, at(11.0)), Ok(()));
        let standing = bucket.standing(at(41.0));
        assert_eq!(standing, Standing { limit: 60, remaining: 30, reset: Duration::from_secs(30) });
        bucket.give_back(1000, at(41.0));
        assert_eq!(bucket.standing(at(41.0)).remaining, 60, "never more than a minute's worth");
    }

    /// A charge above the limit runs when nothing else was used for a minute, and is paid off after.
    #[test]
    fn a_debt() {
        let start = Instant::now();
        let bucket = Bucket::new(60, start);
        assert_eq!(bucket.take(90, start), Ok(()));
        assert_eq!(bucket.standing(start).remaining, 0);
        assert_eq!(bucket.take(1, start), Err(Duration::from_secs(31)));
        assert_eq!(bucket.take(1, start + Duration::from_secs(31)), Ok(()));
    }

    proptest! {
        /// In no stretch of time more is taken than a full bucket and what has flowed in; and who
        /// waits as long as told is served.
        #[test]
        fn never_more_than_the_rate(
            limit in 1u32..1000,
            charges in proptest::collection::vec((1u64..1000, 0u64..20_000), 1..60),
        ) {
            let start = Instant::now();
            let bucket = Bucket::new(limit, start);
            let (mut now, mut taken) = (start, 0);
            for (amount, pause) in charges {
                now += Duration::from_millis(pause);
                let amount = amount.min(u64::from(limit));
                if let Err(wait) = bucket.take(amount, now) {
                    now += wait;
                    prop_assert_eq!(bucket.take(amount, now), Ok(()));
                }
                taken += amount;
                let flowed = f64::from(limit) * (1.0 + (now - start).as_secs_f64() / 60.0);
                prop_assert!(taken as f64 <= flowed + 0.01, "{taken} of {flowed}");
            }
        }
    }
}
