//! Server-sent events out of a byte stream, as far as OpenAI's streams need them: `data` fields.

/// A server that sends a longer event than this is broken; the bound keeps it from filling memory.
const EVENT_BYTES_MAX: usize = 16 << 20;

/// An event grew beyond what any server has reason to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EventTooLong;

/// Splits a byte stream, cut anywhere, into events.
#[derive(Debug, Default)]
pub(super) struct SseDecoder {
    /// The unfinished line.
    line: Vec<u8>,
    /// `data` lines of the unfinished event, joined by line feeds.
    data: Option<String>,
}

impl SseDecoder {
    /// Takes the next bytes and appends the data of every event that they complete to `events`.
    pub(super) fn push(&mut self, bytes: &[u8], events: &mut Vec<String>) -> Result<(), EventTooLong> {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let held = self.line.len() + self.data.as_ref().map_or(0, String::len);
            if held + part.len() > EVENT_BYTES_MAX {
                return Err(EventTooLong);
            }
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.end_line(events);
            }
        }
        Ok(())
    }

    fn end_line(&mut self, events: &mut Vec<String>) {
        let line = String::from_utf8_lossy(&self.line);
        let line = line.trim_end_matches(['\r', '\n']);
        if line.is_empty() {
            events.extend(self.data.take());
        } else if let Some(value) = line.strip_prefix("data:") {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            }
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str =
        ": keep-alive\n\ndata: {\"a\":\"é\"}\n\nevent: x\r\ndata:one\r\ndata: two\r\n\r\ndata: [DONE]\n\n";

    #[test]
    fn any_cut_of_the_bytes_gives_the_same_events() {
        let bytes = STREAM.as_bytes();
        for cut in 0..=bytes.len() {
            let mut decoder = SseDecoder::default();
            let mut events = Vec::new();
            decoder.push(&bytes[..cut], &mut events).unwrap();
            decoder.push(&bytes[cut..], &mut events).unwrap();
            assert_eq!(events, ["{\"a\":\"é\"}", "one\ntwo", "[DONE]"], "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = SseDecoder::default();
        let mut events = Vec::new();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..17).any(|_| decoder.push(&piece, &mut events).is_err());
        assert!(refused && events.is_empty());
    }
}
