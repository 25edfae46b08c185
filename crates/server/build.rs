//! Takes the two files of Swagger UI that the page at `/docs` needs out of their archive, and
//! compresses them as they will be sent.

use std::{
    env,
    error::Error,
    fs::File,
    io::{self, Cursor},
    path::PathBuf,
};

use flate2::{Compression, write::GzEncoder};
use zip::ZipArchive;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let mut archive = ZipArchive::new(Cursor::new(utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED))?;
    for name in ["swagger-ui-bundle.js", "swagger-ui.css"] {
        let end = format!("/dist/{name}");
        let index = (0..archive.len())
            .find(|index| archive.name_for_index(*index).is_some_and(|path| is_of_root(path, &end)))
            .ok_or_else(|| format!("the archive has no {name}"))?;
        let mut encoder = GzEncoder::new(File::create(out.join(format!("{name}.gz")))?, Compression::best());
        io::copy(&mut archive.by_index(index)?, &mut encoder)?;
        encoder.finish()?;
    }
    Ok(())
}

/// `swagger-ui-VERSION/dist/NAME`, not one of the flavours further down.
fn is_of_root(path: &str, end: &str) -> bool {
    path.ends_with(end) && path.matches('/').count() == 2
}
