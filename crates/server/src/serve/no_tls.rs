//! Stands for TLS in builds without it.

use std::io;

use crate::config::TlsFiles;

/// TLS is asked for, and not here.
#[derive(Debug, thiserror::Error)]
#[error("this build has no TLS: build with the feature `tls`, or put a proxy in front")]
pub struct TlsError;

/// There is none.
#[derive(Debug)]
pub(crate) enum Tls {}

impl Tls {
    pub(crate) fn load(_: TlsFiles) -> Result<Self, TlsError> {
        Err(TlsError)
    }

    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        match *self {}
    }

    pub(crate) async fn accept<S>(&self, _: S) -> io::Result<S> {
        match *self {}
    }
}

/// There is no cryptography to provide.
pub fn install_provider() {}
