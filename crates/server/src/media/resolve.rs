//! Names to addresses, all of them checked before anything connects.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::address;

/// Addresses of a name.
pub(super) type Lookup = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// Who knows the addresses of names.
pub(super) trait NameService: Send + Sync {
    /// Looks one up.
    fn look_up(&self, name: &str) -> Lookup;
}

/// The operating system.
pub(super) struct SystemNames;

impl NameService for SystemNames {
    fn look_up(&self, name: &str) -> Lookup {
        let name = name.to_owned();
        Box::pin(async move {
            let addresses = tokio::net::lookup_host((name, 0)).await?;
            Ok(addresses.map(|address| address.ip()).collect())
        })
    }
}

/// Which addresses may be connected to.
pub(super) type Allowed = fn(IpAddr) -> bool;

/// Every address of a name must be allowed. The connection goes to what was checked: nothing is
/// looked up a second time, so a name that changes its mind in between gains nothing.
pub(super) struct CheckedNames {
    names: Arc<dyn NameService>,
    is_allowed: Allowed,
}

/// Some address of the name is not public.
#[derive(Debug, thiserror::Error)]
#[error("the name has an address that is not public")]
pub(super) struct NotPublic;

impl CheckedNames {
    /// The operating system's names, public addresses only.
    pub(super) fn of_system() -> Self {
        Self { names: Arc::new(SystemNames), is_allowed: address::is_public }
    }

    #[cfg(test)]
    pub(super) fn for_test(names: Arc<dyn NameService>, is_allowed: Allowed) -> Self {
        Self { names, is_allowed }
    }

    /// Checks an address that stands in a URL, which no name service is asked for.
    pub(super) fn allows(&self, address: IpAddr) -> bool {
        (self.is_allowed)(address)
    }
}

impl Resolve for CheckedNames {
    fn resolve(&self, name: Name) -> Resolving {
        let (lookup, is_allowed) = (self.names.look_up(name.as_str()), self.is_allowed);
        Box::pin(async move {
            let addresses = lookup.await?;
            if addresses.is_empty() {
                return Err(io::Error::other("the name has no address").into());
            }
            if !addresses.iter().copied().all(is_allowed) {
                return Err(NotPublic.into());
            }
            let addresses: Addrs = Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}
