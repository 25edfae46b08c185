//! TLS with rustls on ring: certificate and key from PEM files, read again on demand.

use std::{
    io,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::config::TlsFiles;

/// Certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that is not there, or holds something else.
    #[error("TLS {what} {path}: {reason}")]
    File {
        /// Certificate or key.
        what: &'static str,
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The two do not belong together, or are of a kind that is not supported.
    #[error("TLS certificate and key: {0}")]
    Pair(String),
}

/// The server's side of TLS.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads certificate and key.
    ///
    /// # Errors
    /// Files that cannot be used.
    pub(crate) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let current = RwLock::new(Arc::new(read(&files)?));
        Ok(Self { files, current })
    }

    /// Reads both files again; connections from now on use them.
    ///
    /// # Errors
    /// As [`Self::load`]; then what was read before stays in use.
    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let fresh = Arc::new(read(&self.files)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Encrypts a connection.
    ///
    /// # Errors
    /// The client speaks no TLS, or none that is accepted.
    pub(crate) async fn accept<S>(&self, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
        TlsAcceptor::from(config).accept(stream).await
    }
}

fn read(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let of_file = |what, path: &Path, error: pem::Error| TlsError::File {
        what,
        path: path.display().to_string(),
        reason: match error {
            pem::Error::NoItemsFound => "there is none in PEM form".into(),
            pem::Error::Io(error) => error.to_string(),
            // Others may quote the file.
            _ => "not well-formed PEM".into(),
        },
    };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| of_file("certificate", &files.certificate, error))?;
    if chain.is_empty() {
        return Err(of_file("certificate", &files.certificate, pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| of_file("key", &files.key, error))?;
    let pair = |error: rustls::Error| TlsError::Pair(error.to_string());
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Makes ring the process's provider of cryptography, unless there is one. HTTP clients need it before
/// they are made.
pub fn install_provider() {
    if CryptoProvider::get_default().is_none() {
        // An error says that another thread was faster.
        let _ = ring::default_provider().install_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_be_used_say_why() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("written");
            path
        };
        let pair = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let (ours, other) = (pair(), pair());
        let good = write("good.pem", &ours.cert.pem());
        let key = write("key.pem", &ours.signing_key.serialize_pem());
        let other_key = write("other.pem", &other.signing_key.serialize_pem());
        let broken = write("broken.pem", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n");
        let files =
            |certificate: &Path, key: &Path| TlsFiles { certificate: certificate.into(), key: key.into() };
        let reason = |certificate, key| Tls::load(files(certificate, key)).expect_err("unusable").to_string();
        let tls = Tls::load(files(&good, &key)).expect("a good pair");
        let missing = folder.path().join("missing.pem");
        assert!(reason(&missing, &key).contains("missing.pem"));
        assert!(reason(&key, &key).contains("TLS certificate") && reason(&good, &good).contains("TLS key"));
        assert!(reason(&broken, &key).contains("not well-formed"));
        assert!(reason(&good, &other_key).contains("certificate and key"));
        tls.reload().expect("still good");
        std::fs::write(&key, "").expect("written");
        assert!(tls.reload().is_err());
    }
}
