//! Servers on this machine that are slow, huge, redirecting and lying, behind names that only the
//! tests know.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Mutex,
};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, Uri},
    response::IntoResponse as _,
    routing::get,
};
use futures_util::stream;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::media::{
    HostList, MediaType, address,
    resolve::{Lookup, NameService},
    size::{examples, png_of},
};

/// Answers in turn, the last one for ever.
struct Names(Mutex<HashMap<String, Vec<Vec<IpAddr>>>>);

impl NameService for Names {
    fn look_up(&self, name: &str) -> Lookup {
        let mut names = self.0.lock().expect("no panics");
        let answer = names
            .get_mut(name)
            .map(|answers| if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() });
        Box::pin(async move { answer.ok_or_else(|| io::Error::other("unknown name")) })
    }
}

/// Loopback counts as public here, because the servers are there; all else as always.
fn loopback_or_public(address: IpAddr) -> bool {
    address == IpAddr::V4(Ipv4Addr::LOCALHOST) || address::is_public(address)
}

/// A fetcher that may ask `*.test` at this port, with names and their addresses.
fn fetcher(port: u16, names: &[(&str, &[&[&str]])]) -> Fetcher {
    let hosts = [
        format!("*.test:{port}"),
        format!("127.0.0.1:{port}"),
        format!("10.0.0.1:{port}"),
        format!("[::1]:{port}"),
    ];
    let settings = ImageSettings {
        max_bytes: 100_000,
        url_hosts: HostList::new(&hosts).expect("hosts"),
        url_timeout: Duration::from_secs(20),
        ..ImageSettings::default()
    };
    let address = |text: &&str| text.parse::<IpAddr>().expect("an address");
    let names = names.iter().map(|(name, answers)| {
        let answers = answers.iter().map(|answer| answer.iter().map(address).collect());
        ((*name).to_owned(), answers.collect())
    });
    let names = Arc::new(Names(Mutex::new(names.collect())));
    Fetcher::with_names(settings, CheckedNames::for_test(names, loopback_or_public)).expect("a client")
}

async fn fetch(fetcher: &Fetcher, url: &str) -> Result<EncodedImage, MediaError> {
    fetcher.fetch(ImageSource::parse(url, &fetcher.settings)?).await
}

/// A server of images and of trouble.
async fn server() -> u16 {
    let endless = || async {
        let chunks = stream::repeat_with(|| Ok::<_, io::Error>(vec![0u8; 10_000]));
        Body::from_stream(chunks).into_response()
    };
    let redirect = |uri: Uri| async move {
        let to = uri.query().unwrap_or_default().to_owned();
        (StatusCode::FOUND, [("location", to)]).into_response()
    };
    let around = |uri: Uri| async move {
        let left: u32 = uri.query().and_then(|left| left.parse().ok()).unwrap_or(0);
        match left {
            0 => png_of(3, 2).into_response(),
            left => (StatusCode::TEMPORARY_REDIRECT, [("location", format!("/around?{}", left - 1))])
                .into_response(),
        }
    };
    let router = Router::new()
        .route("/png", get(|| async { ([("content-type", "text/html")], png_of(3, 2)) }))
        .route("/html", get(|| async { ([("content-type", "image/png")], "<html>") }))
        .route("/missing", get(|| async { (StatusCode::NOT_FOUND, png_of(3, 2)) }))
        .route("/nowhere", get(|| async { StatusCode::FOUND }))
        .route("/never", get(std::future::pending::<&str>))
        .route("/endless", get(endless))
        .route("/declared", get(|| async { vec![0u8; 200_000] }))
        .route("/redirect", get(redirect))
        .route("/around", get(around));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move { axum::serve(listener, router).await });
    port
}

const HERE: &[&[&str]] = &[&["127.0.0.1"]];

#[tokio::test]
async fn images_by_name_and_by_address() {
    let port = server().await;
    let fetcher = fetcher(port, &[("a.test", HERE)]);
    for host in ["a.test", "127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1"] {
        let image = fetch(&fetcher, &format!("http://{host}:{port}/png")).await.expect("an image");
        assert_eq!((image.media_type, image.size.pixels()), (MediaType::Png, 6), "{host}");
    }
    let inline = ImageSource::Inline(
        EncodedImage::inspect(examples().remove(1).1.into(), &fetcher.settings).expect("an image"),
    );
    assert_eq!(fetcher.fetch(inline).await.expect("as it is").media_type, MediaType::Jpeg);
}

#[tokio::test]
async fn servers_that_lie_or_fail() {
    let port = server().await;
    let fetcher = fetcher(port, &[("a.test", HERE)]);
    let error = async |path: &str| {
        fetch(&fetcher, &format!("http://a.test:{port}{path}")).await.expect_err("no image")
    };
    assert_eq!(error("/html").await, MediaError::NotAnImage);
    assert!(matches!(error("/missing").await, MediaError::Download(reason) if reason.contains("404")));
    assert!(matches!(error("/nowhere").await, MediaError::Download(_)));
    let too_large = MediaError::TooManyBytes { limit: 100_000 };
    assert_eq!((error("/endless").await, error("/declared").await), (too_large.clone(), too_large));
    let hidden = Err(not_public());
    assert_eq!(fetch(&fetcher, &format!("http://unknown.test:{port}/")).await, hidden);
}

/// Sends a few bytes and then nothing: the time limit covers head and body.
#[tokio::test]
async fn servers_that_are_slow() {
    let port = server().await;
    let mut slow = fetcher(port, &[("a.test", HERE)]);
    slow.settings.url_timeout = Duration::from_millis(50);
    let error = fetch(&slow, &format!("http://a.test:{port}/never")).await.expect_err("never");
    assert!(matches!(&error, MediaError::Download(reason) if reason.contains("0.05 seconds")), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let dribbling = async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        stream.read_buf(&mut Vec::with_capacity(1000)).await.expect("a request");
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 33\r\n\r\n\x89PNG").await.expect("sent");
        // Held open until the client leaves.
        let _ = stream.read_buf(&mut Vec::with_capacity(1000)).await;
    };
    let mut slow = fetcher(port, &[("a.test", HERE)]);
    slow.settings.url_timeout = Duration::from_millis(200);
    let url = format!("http://a.test:{port}/");
    let (result, ()) = tokio::join!(fetch(&slow, &url), dribbling);
    assert!(matches!(result, Err(MediaError::Download(_))), "{result:?}");
}

#[tokio::test]
async fn redirects_are_checked_and_counted() {
    let port = server().await;
    let names: &[(&str, &[&[&str]])] = &[("a.test", HERE), ("inside.test", &[&["10.1.2.3"]])];
    let fetcher = fetcher(port, names);
    let get = async |path: &str| fetch(&fetcher, &format!("http://a.test:{port}{path}")).await;
    assert!(get("/around?3").await.is_ok());
    assert!(
        matches!(get("/around?4").await, Err(MediaError::Download(reason)) if reason.contains("3 redirects"))
    );
    assert!(get(&format!("/redirect?http://127.0.0.1:{port}/png")).await.is_ok());
    let inside = [
        format!("http://10.0.0.1:{port}/"),
        format!("http://[::1]:{port}/"),
        format!("http://inside.test:{port}/"),
        "http://a.test/".into(),
        "http://169.254.169.254/latest/meta-data".into(),
        format!("http://user:pw@a.test:{port}/png"),
        "file:///etc/passwd".into(),
        "data:image/png;base64,AAAA".into(),
        "http://".into(),
    ];
    for to in inside {
        let result = get(&format!("/redirect?{to}")).await;
        assert!(matches!(result, Err(MediaError::Download(_))), "{to}: {result:?}");
    }
}

#[test]
fn redirects_never_leave_https() {
    let fetcher = fetcher(443, &[]);
    let to = |location: &str| {
        let response = axum::http::Response::builder().status(302).header("location", location).body("");
        let from = Url::parse("https://a.test/x/y").expect("a URL");
        fetcher.redirected(&from, &Response::from(response.expect("a response"))).map(String::from)
    };
    assert_eq!(to("z").as_deref(), Ok("https://a.test/x/z"));
    assert_eq!(to("//b.test/").as_deref(), Ok("https://b.test/"));
    assert!(to("http://a.test:443/x").is_err() && to("https://other.example/").is_err());
}

/// Addresses that are not public are refused wherever they stand: alone, beside public ones, in the
/// URL, and when a name changes its mind.
#[tokio::test]
async fn names_that_point_inside() {
    let port = server().await;
    let fetcher = fetcher(
        port,
        &[
            ("inside.test", &[&["10.0.0.1"]]),
            ("mixed.test", &[&["127.0.0.1", "192.168.0.1"]]),
            ("mapped.test", &[&["::ffff:10.0.0.1"]]),
            ("rebinding.test", &[&["127.0.0.1"], &["169.254.169.254"]]),
            ("empty.test", &[&[]]),
        ],
    );
    let get = async |host: &str| fetch(&fetcher, &format!("http://{host}:{port}/png")).await;
    for host in ["inside.test", "mixed.test", "mapped.test", "empty.test", "10.0.0.1", "[::1]"] {
        assert_eq!(get(host).await, Err(not_public()), "{host}");
    }
    assert!(get("rebinding.test").await.is_ok());
    assert_eq!(get("rebinding.test").await, Err(not_public()));
}

/// What is refused is never connected to.
#[tokio::test]
async fn nothing_is_sent_to_a_refused_address() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let SocketAddr::V4(at) = listener.local_addr().expect("an address") else { panic!("IPv4") };
    let settings = ImageSettings {
        url_hosts: HostList::new(&[format!("a.test:{}", at.port()), at.to_string()]).expect("hosts"),
        ..ImageSettings::default()
    };
    let names = Names(Mutex::new([("a.test".to_owned(), vec![vec![IpAddr::V4(*at.ip())]])].into()));
    // The real rule: loopback is not public.
    let names = CheckedNames::for_test(Arc::new(names), address::is_public);
    let fetcher = Fetcher::with_names(settings, names).expect("a client");
    for host in ["a.test".to_owned(), at.ip().to_string()] {
        assert_eq!(fetch(&fetcher, &format!("http://{host}:{}/", at.port())).await, Err(not_public()));
    }
    tokio::select! {
        biased;
        _ = listener.accept() => panic!("something connected"),
        () = std::future::ready(()) => {}
    }
}
