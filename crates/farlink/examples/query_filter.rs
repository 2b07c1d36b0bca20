//! A query's filter as compiled code, over a column that both processes have.
//!
//!     cargo run --release -p farlink --example query_filter -- 'price > 900 && price % 7 == 0'
//!
//! A database engine that compiles its queries does this: the condition becomes a loop that the compiler vectorizes; it runs
//! where a mistake of the compiler's, or of the condition, ends no more than itself; and the column and the positions that
//! it finds are never copied.

mod common;

use common::{Result, compile};
use farlink::Session;
use std::time::Instant;

const ROWS: usize = 4_000_000;

/// Numbers without a pattern, the same in every run.
fn prices() -> Vec<i32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as i32 % 1000
    };
    (0..ROWS).map(|_| next()).collect()
}

/// A function that writes the positions of the rows that satisfy a condition; gives their number.
fn filter_source(condition: &str) -> String {
    format!(
        "#include <stddef.h>
        #include <stdint.h>
        size_t filter(const int32_t *restrict column, size_t rows, uint32_t *restrict found) {{
            size_t count = 0;
            for (size_t row = 0; row < rows; row++) {{
                const int32_t price = column[row];
                found[count] = row;
                count += ({condition}) ? 1 : 0;
            }}
            return count;
        }}"
    )
}

fn main() -> Result<()> {
    farlink::executor::init();
    let condition = std::env::args().nth(1).unwrap_or("price > 900 && price % 7 == 0".to_owned());

    let session = Session::spawn()?;
    let column = session.shared_buffer::<i32>(ROWS)?;
    // One more than there can be: the loop writes a position before it knows whether it counts.
    let found = session.shared_buffer::<u32>(ROWS + 1)?;
    column.write(0, &prices())?;

    let start = Instant::now();
    let object = compile(&filter_source(&condition), &["-O3", "-march=native"])?;
    println!("compiled in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    let library = session.create_library("query");
    library.add_object("filter.o", object)?;
    let filter = library.function::<fn(*const i32, usize, *mut u32) -> usize>("filter")?;
    println!("linked in {:.3} ms", start.elapsed().as_secs_f64() * 1e3);

    let start = Instant::now();
    // SAFETY: the source above declares the function so, and it stays in both buffers.
    let count = unsafe { filter.call((column.executor_ptr(), column.len(), found.executor_ptr())) }?;
    println!("{ROWS} rows in {:.1} ms: {count} of them", start.elapsed().as_secs_f64() * 1e3);
    for index in 0..count.min(3) {
        let row = found.get(index)?;
        println!("row {row}: {}", column.get(row as usize)?);
    }
    Ok(())
}
