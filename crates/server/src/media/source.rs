//! References: data URIs and URLs.

use axum::body::Bytes;
use data_url::DataUrl;
use url::Url;

use super::{EncodedImage, HostList, ImageSettings, MediaError, MediaType};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// It came with the request.
    Inline(EncodedImage),
    /// At a URL whose host is allowed.
    Remote(Url),
}

impl ImageSource {
    /// Reads a reference; nothing is fetched.
    ///
    /// # Errors
    /// What is wrong with it, or with the image that it holds.
    pub fn parse(text: &str, settings: &ImageSettings) -> Result<Self, MediaError> {
        let scheme = text.get(..5).unwrap_or_default();
        if scheme.eq_ignore_ascii_case("data:") {
            return read_data(text, settings).map(Self::Inline);
        }
        check_url(text, &settings.url_hosts).map(Self::Remote)
    }
}

/// Longest part of a data URI in front of its data, comma included.
const MAX_HEADER: usize = 256;

fn read_data(text: &str, settings: &ImageSettings) -> Result<EncodedImage, MediaError> {
    // Four characters are three bytes; what is far too long is not decoded first.
    if text.len() / 4 > settings.max_bytes / 3 + 1024 {
        return Err(MediaError::TooManyBytes { limit: settings.max_bytes });
    }
    // Finding parameters takes time that grows with the square of their number.
    if text.bytes().take(MAX_HEADER).all(|byte| byte != b',') {
        let reason = format!("is a data URI without a comma in its first {MAX_HEADER} bytes");
        return Err(MediaError::Url(reason));
    }
    let data = DataUrl::process(text)
        .map_err(|_| MediaError::Url("is not a data URI such as data:image/png;base64,...".into()))?;
    let mime = data.mime_type();
    let name = format!("{}/{}", mime.type_, mime.subtype);
    if MediaType::of_name(&name).is_none() {
        return Err(MediaError::MediaType(crate::error::clip(&name)));
    }
    let head = text.split_once(',').map_or("", |(head, _)| head);
    if !head.trim_end().to_ascii_lowercase().ends_with("base64") {
        return Err(MediaError::Base64);
    }
    let (bytes, fragment) = data.decode_to_vec().map_err(|_| MediaError::Base64)?;
    if bytes.is_empty() || fragment.is_some() {
        return Err(MediaError::Base64);
    }
    EncodedImage::inspect(Bytes::from(bytes), settings)
}

/// Checks a URL before anything is looked up; each redirect goes through this as well.
pub(super) fn check_url(text: &str, hosts: &HostList) -> Result<Url, MediaError> {
    const MAX_BYTES: usize = 8192;
    let wrong = |reason: &str| Err(MediaError::Url(reason.into()));
    if text.len() > MAX_BYTES {
        return wrong("is a URL of more than 8192 bytes");
    }
    let Ok(url) = Url::parse(text) else {
        return wrong("is neither a data URI (data:image/png;base64,...) nor an http(s) URL");
    };
    if !matches!(url.scheme(), "http" | "https") {
        return wrong("has a scheme that is not offered; there are data, http and https");
    }
    if hosts.is_empty() {
        return wrong("is a URL, but this server fetches no images; send it as data:image/png;base64,...");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return wrong("must not hold a user name or a password");
    }
    if !hosts.allows(&url) {
        return wrong("points to a host or port that this server fetches no images from");
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::media::{PixelSize, size::examples};

    fn settings() -> ImageSettings {
        let url_hosts = HostList::new(&["images.example".to_owned()]).expect("a host");
        ImageSettings { max_bytes: 1000, max_pixels: 10_000, url_hosts, ..ImageSettings::default() }
    }

    fn data_uri(mime: &str, bytes: &[u8]) -> String {
        format!("data:{mime};base64,{}", base64(bytes))
    }

    /// Standard alphabet, with padding.
    fn base64(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for group in bytes.chunks(3) {
            let word =
                group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
            for digit in 0..4 {
                let index = (word >> (18 - 6 * digit)) as usize & 63;
                text.push(if digit <= group.len() { char::from(DIGITS[index]) } else { '=' });
            }
        }
        text
    }

    #[test]
    fn data_uris() {
        for (media_type, bytes) in examples() {
            // The bytes decide, not the name.
            for mime in ["image/png", "image/jpeg", "image/jpg", "IMAGE/WEBP", "image/gif", "image/bmp"] {
                let source = ImageSource::parse(&data_uri(mime, &bytes), &settings()).expect("an image");
                let ImageSource::Inline(image) = source else { panic!("inline") };
                assert_eq!((image.media_type, image.size), (media_type, PixelSize { width: 3, height: 2 }));
                assert_eq!(image.bytes, bytes);
            }
        }
    }

    #[test]
    fn references_that_are_refused() {
        let png = examples().remove(0).1;
        let settings = settings();
        let good = data_uri("image/png", &png);
        let unsupported = MediaError::MediaType("image/svg+xml".into());
        let rows = [
            (good.replace("base64", "base65"), MediaError::Base64),
            (good.replace(";base64", ""), MediaError::Base64),
            ("data:image/png;base64,####".into(), MediaError::Base64),
            ("data:image/png;base64,".into(), MediaError::Base64),
            (data_uri("image/svg+xml", b"<svg/>"), unsupported),
            (data_uri("image/png", b"<html>"), MediaError::NotAnImage),
            (data_uri("image/png", &png[..20]), MediaError::NotAnImage),
            (data_uri("image/png", &[0; 1001]), MediaError::TooManyBytes { limit: 1000 }),
            (data_uri("image/png", &[0; 90_000]), MediaError::TooManyBytes { limit: 1000 }),
        ];
        for (text, wanted) in rows {
            assert_eq!(ImageSource::parse(&text, &settings), Err(wanted), "{}", &text[..text.len().min(60)]);
        }
        let wide = crate::media::size::png_of(101, 100);
        let error =
            ImageSource::parse(&data_uri("image/png", &wide), &settings).expect_err("too many pixels");
        assert_eq!(error.clone().into_api_error("url").kind, crate::error::ErrorKind::ImageTooLarge);
        assert!(error.to_string().contains("101 x 100"), "{error}");
        for text in [
            base64(&png),
            "data:".into(),
            good.replace(';', &";a".repeat(130)),
            format!("data:image/png{}", ";a".repeat(2000)),
            "".into(),
            "/etc/passwd".into(),
            "file:///etc/passwd".into(),
            "ftp://images.example/a.png".into(),
            "https://user:pw@images.example/a.png".into(),
            "https://user@images.example/a.png".into(),
            "https://other.example/a.png".into(),
            "https://images.example:8443/a.png".into(),
            "https://images.example.evil.example/a.png".into(),
            "https://evil.example/images.example".into(),
            "https://images.example@evil.example/".into(),
            "http://".into(),
            format!("https://images.example/{}", "a".repeat(9000)),
        ] {
            let error = ImageSource::parse(&text, &settings).expect_err("no reference");
            assert!(matches!(error, MediaError::Url(_)), "{text}: {error:?}");
        }
        let none = ImageSettings { url_hosts: HostList::default(), ..settings };
        assert!(matches!(ImageSource::parse("https://images.example/", &none), Err(MediaError::Url(_))));
    }

    #[test]
    fn allowed_urls() {
        for text in
            ["https://images.example/a.png?b=c", "HTTP://IMAGES.example:80/", "https://images.example./x"]
        {
            let source = ImageSource::parse(text, &settings()).expect("allowed");
            assert!(matches!(source, ImageSource::Remote(_)), "{text}");
        }
    }

    proptest! {
        /// Any text is a reference or an error; any bytes are an image or an error.
        #[test]
        fn nothing_panics(text in "(data:|image/png|;base64|,|https?://|images.example|.){0,9}", bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = ImageSource::parse(&text, &settings());
            let uri = data_uri("image/png", &bytes);
            prop_assert!(!matches!(ImageSource::parse(&uri, &settings()), Err(MediaError::Url(_))));
        }
    }
}
