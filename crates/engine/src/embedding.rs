//! One vector for a whole prompt, from the hidden states of its rows.

use crate::scoring::NotFinite;

/// Rows of hidden states that are held at once.
pub(crate) const POOLED_ROWS: usize = 128;

/// Which hidden states, after the final norm, make a prompt's vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pooling {
    /// The last token's, which has seen all the others.
    #[default]
    Last,
    /// The mean of all tokens'.
    Mean,
}

/// A pool that is being filled, row by row in the order of positions, so that its bits do not depend
/// on chunks.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    pooling: Pooling,
    /// Sum of the states, or the last one `[hidden_size]`.
    sum: Vec<f64>,
    rows: u32,
}

impl Pool {
    pub(crate) fn new(pooling: Pooling) -> Self {
        Self { pooling, sum: Vec::new(), rows: 0 }
    }

    /// Whether the state of the row at `position` of a prompt of `len` tokens is needed.
    pub(crate) fn wants(&self, position: u32, len: u32) -> bool {
        match self.pooling {
            Pooling::Last => position + 1 == len,
            Pooling::Mean => true,
        }
    }

    /// Takes in the next row's state `[hidden_size]`.
    ///
    /// # Errors
    /// [`NotFinite`] if it holds NaN or infinity.
    pub(crate) fn add(&mut self, state: &[f32]) -> Result<(), NotFinite> {
        if !state.iter().all(|value| value.is_finite()) {
            return Err(NotFinite);
        }
        self.sum.resize(state.len(), 0.0);
        for (sum, &value) in self.sum.iter_mut().zip(state) {
            *sum += f64::from(value);
        }
        self.rows += 1;
        Ok(())
    }

    /// The pooled vector, of length 1 (or zeros, if all states were). A mean has the direction of
    /// its sum, so nothing is divided by the number of rows.
    pub(crate) fn finish(self) -> Vec<f32> {
        debug_assert!(self.rows > 0, "at least one row");
        let length = self.sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        self.sum.iter().map(|value| (value * scale) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_and_mean() {
        let mut mean = Pool::new(Pooling::Mean);
        mean.add(&[3.0, 1.0]).unwrap();
        mean.add(&[0.0, 3.0]).unwrap();
        assert_eq!(mean.finish(), [0.6, 0.8]);
        let mut last = Pool::new(Pooling::Last);
        assert!(last.wants(4, 5) && !last.wants(3, 5));
        last.add(&[0.0, -2.0]).unwrap();
        assert_eq!(last.finish(), [0.0, -1.0]);
    }

    #[test]
    fn nothing_but_numbers_comes_out() {
        let mut zeros = Pool::new(Pooling::Mean);
        zeros.add(&[0.0, 0.0]).unwrap();
        assert_eq!(zeros.clone().finish(), [0.0, 0.0]);
        assert_eq!(zeros.add(&[f32::INFINITY, 0.0]), Err(NotFinite));
    }
}
