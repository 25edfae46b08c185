//! A five-digit pass key, said once somewhere in the text and asked for at its end.

use super::{DEEPEST, Draft, Probe};
use crate::Error;

pub(super) fn probe(draft: &mut Draft<'_>) -> Result<Probe, Error> {
    let key = draft.number();
    let needle =
        draft.encode(&format!("\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"))?;
    let asked = draft.ask("\n\nWhat is the pass key? The pass key is", &format!(" {key}"))?;
    draft.assemble(&[needle], 0, DEEPEST, &[asked])
}
