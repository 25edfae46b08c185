//! The operator's list of hosts that images may be fetched from.

use url::{Host, Url};

/// Exact hosts, and `*.example.org` for all hosts below one; with `:port` for other ports than 80 and
/// 443.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostList {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// In the form in which URLs have it.
    host: String,
    /// Hosts below it, not itself.
    is_suffix: bool,
    port: Option<u16>,
}

/// An entry that names no host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a host such as images.example.org, *.example.org or images.example.org:8443")]
pub struct HostListError(String);

impl HostList {
    /// Reads the list.
    ///
    /// # Errors
    /// The first entry that names no host.
    pub fn new(entries: &[String]) -> Result<Self, HostListError> {
        let entries = entries.iter().map(|text| Entry::read(text).ok_or_else(|| HostListError(text.clone())));
        Ok(Self { entries: entries.collect::<Result<_, _>>()? })
    }

    /// Nothing may be fetched.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether an image may be fetched from the host and port of `url`.
    pub(super) fn allows(&self, url: &Url) -> bool {
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return false };
        let host = host.strip_suffix('.').unwrap_or(host);
        self.entries.iter().any(|entry| entry.allows(host, port))
    }
}

impl Entry {
    fn read(text: &str) -> Option<Self> {
        let (name, is_suffix) = match text.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (text, false),
        };
        if name.is_empty() || name.contains(['*', '/', '@', '?', '#']) {
            return None;
        }
        // URLs know all spellings of a host.
        let url = Url::parse(&format!("http://{name}/")).ok()?;
        let is_address = !matches!(url.host()?, Host::Domain(_));
        let host = url.host_str()?;
        let host = host.strip_suffix('.').unwrap_or(host).to_owned();
        let port = match name.rsplit_once(':') {
            // The brackets of an address hold colons of their own.
            Some((_, port)) if !port.ends_with(']') => Some(port.parse().ok()?),
            _ => None,
        };
        (!is_suffix || !is_address).then_some(Self { host, is_suffix, port })
    }

    fn allows(&self, host: &str, port: u16) -> bool {
        let is_port = self.port.map_or(matches!(port, 80 | 443), |own| own == port);
        let is_host = if self.is_suffix {
            host.strip_suffix(&self.host).is_some_and(|rest| rest.ends_with('.') && rest.len() > 1)
        } else {
            host == self.host
        };
        is_port && is_host
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        let list = [
            "a.example",
            "*.b.example",
            "C.example:8080",
            "bücher.example",
            "[2001:db8::1]",
            "93.184.216.34",
        ];
        let list = HostList::new(&list.map(str::to_owned)).expect("hosts");
        let allows = |url: &str| list.allows(&Url::parse(url).expect("a URL"));
        for good in [
            "http://a.example/",
            "https://A.EXAMPLE./x",
            "https://x.b.example/",
            "https://x.y.b.example/",
            "http://c.example:8080/",
            "https://xn--bcher-kva.example/",
            "http://[2001:db8:0::1]/",
            "http://93.184.216.34/",
            "http://0x5db8d822/",
        ] {
            assert!(allows(good), "{good}");
        }
        for bad in [
            "http://a.example:8080/",
            "http://b.example/",
            "http://xb.example/",
            "http://.b.example/",
            "http://c.example/",
            "http://aa.example/",
            "http://a.example.org/",
            "http://127.0.0.1/",
        ] {
            assert!(!allows(bad), "{bad}");
        }
        assert!(!HostList::default().allows(&Url::parse("http://a.example/").expect("a URL")));
    }

    #[test]
    fn entries_that_name_no_host() {
        for wrong in
            ["", "*", "*.", "a.*.b", "http://a.example", "a/b", "u@a.example", "a:99999", "a:", "*.127.0.0.1"]
        {
            assert!(HostList::new(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }
}
